"""The scan on a CUDA device against its bars: `python benchmarks/scan_gpu.py`, or `make bench-gpu`.

Four directions over one map, delta of rank R rebuilt in the kernel. Share of copy bandwidth: the bytes a one-pass
kernel must move (map read once, output written once, r, B and C of every direction read once) over the time taken,
against a device copy that moves as many bytes. Copy-scan-merge is four permuted copies, delta written out, the same
scan kernel, flips and sums. Medians of CUDA events, the L2 cache flushed before each call; compile times in a fresh
process with an empty kernel cache. Without a device it says so and measures nothing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from scan import copy_scan_merge, row
from torch import Tensor

from medmamba.ops.backend import backend_report, resolve
from medmamba.ops.scan_directions import all_directions, selective_scan_directions

REPEATS = 20
BYTES = [(4, 192, 56, 56, 1), (64, 192, 56, 56, 1), (1, 96, 512, 512, 1)]  # batch, channels, height, width, N
RATIOS = [*BYTES, (64, 192, 56, 56, 16), (1, 96, 128, 128, 16)]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device, after two that are not counted, the L2 cache flushed before each."""
    flush, times = torch.empty(64 << 20, device="cuda"), []
    for i in range(REPEATS + 2):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if i >= 2 else []
    return statistics.median(times)


def arguments(shape: tuple[int, int, int, int, int]) -> dict[str, Tensor]:
    """Channels-last arguments of four directions over one map, delta of rank C / 16."""
    batch, channels, height, width, states = shape
    rank, space = channels // 16, (height, width)
    torch.manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda")

    return {
        "u": draw(batch, *space, channels),
        "delta": draw(batch, 4, *space, rank),
        "A": -torch.rand(4, channels, states, device="cuda") * 4,
        "B": draw(batch, 4, *space, states),
        "C": draw(batch, 4, *space, states),
        "D": draw(4, channels),
        "delta_bias": draw(4, channels) - 3,
        "delta_weight": draw(4, channels, rank) / rank,
    }


def fused(args: dict[str, Tensor]) -> Tensor:
    return selective_scan_directions(**args, delta_softplus=True, directions=all_directions(2))


def usual(args: dict[str, Tensor]) -> Tensor:
    """Copy, scan, merge, with delta of every direction written out; the positions of r, B and C are as good as any."""
    delta = args["delta"].flatten(2, 3) @ args["delta_weight"].mT + args["delta_bias"][:, None]
    B, C = (args[name].flatten(2, 3).mT for name in "BC")
    return copy_scan_merge(args["u"], delta.mT.flatten(1, 2), args["A"].flatten(0, 1), B, C, args["D"].flatten())


def fused_bytes(args: dict[str, Tensor]) -> int:
    """Map read, output written, r, B, C read: once each."""
    return 2 * args["u"].nbytes + sum(args[name].nbytes for name in ("delta", "B", "C"))


def both_ways(scan: Callable[[dict[str, Tensor]], Tensor], args: dict[str, Tensor]) -> Callable[[], object]:
    leaves = {name: x.clone().requires_grad_() for name, x in args.items()}
    return lambda: torch.autograd.grad(scan(leaves).sum(), list(leaves.values()))


def peak_maps(call: Callable[[], object], unit: int) -> float:
    """Extra device memory of a call, in maps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / unit


def first_call() -> None:
    """Print the seconds of the first forward, and of the first backward after it; needs a fresh process."""
    args = arguments((4, 96, 32, 32, 16))
    torch.cuda.synchronize()
    for call in (lambda: fused(args), both_ways(fused, args)):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        print(time.perf_counter() - start)


def compile_seconds() -> list[float]:
    with tempfile.TemporaryDirectory() as empty:
        command, environment = [sys.executable, __file__, "--first-call"], os.environ | {"TRITON_CACHE_DIR": empty}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [float(x) for x in done.stdout.split()]


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    if "--first-call" in sys.argv:
        first_call()
        return
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, scan on CUDA: {backend_report()['cuda']}")
    if resolve("auto", torch.empty(1, device="cuda"))[0] != "triton":
        print("triton does not serve: the bars are not measured")
        return
    print(f"{'':72} {'measured':>10} {'must':>9} {'aim':>9}")
    for what, seconds in zip(("forward", "backward"), compile_seconds()):
        print(row(f"first call, {what}, compile included, seconds", seconds, 10, 5, more=False))
    for shape in BYTES:
        args = arguments(shape)
        with torch.no_grad():
            taken = milliseconds(lambda a=args: fused(a))
        source = torch.empty(fused_bytes(args) // 8, device="cuda")
        target = torch.empty_like(source)
        copied = milliseconds(lambda s=source, t=target: t.copy_(s))
        print(row(f"share of copy bandwidth, one-pass bytes, {shape}", copied / taken, 0.6, 0.8, more=True, form=".2f"))
    for shape in RATIOS:
        args = arguments(shape)
        unit = args["u"].nbytes
        with torch.no_grad():
            times = [milliseconds(lambda s=scan, a=args: s(a)) for scan in (usual, fused)]
            extra = peak_maps(lambda a=args: fused(a), unit)
        print(row(f"over copy-scan-merge, forward, {shape}", times[0] / times[1], 3, 5, more=True))
        times = [milliseconds(both_ways(scan, args)) for scan in (usual, fused)]
        print(row(f"over copy-scan-merge, forward+backward, {shape}", times[0] / times[1], 3, 5, more=True))
        both = peak_maps(both_ways(fused, args), unit)
        print(f"{f'extra maps (output included), {shape}':72} {extra:>10.2f} forward, {both:.2f} forward+backward")


if __name__ == "__main__":
    main()
