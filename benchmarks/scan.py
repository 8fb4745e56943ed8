"""Speed, memory and error of the selective scan: `python benchmarks/scan.py [--quick]`.

Ratios within this run, one thread, process CPU time, medians; `must` and `aim` beside each figure. Two anchors are
written here: the per-step loop is ops.scan.scan_sequential, the log-depth scan a Blelloch tree in torch with its own
backward (as alxndrTL/mamba.py does it). Memory is the growth of resident memory in a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from machine import machine
from torch import Tensor

from medmamba.ops.backend import backend_report
from medmamba.ops.scan import scan_sequential, selective_scan
from medmamba.ops.scan_directions import all_directions, selective_scan_directions

S1, S3 = (1, 96, 32768, 16), (4, 192, 3136, 1)
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def inputs(shape: tuple[int, int, int, int], *, last: bool, grad: bool = False) -> dict[str, Tensor]:
    """Arguments of one scan of (B, D, L, N); `last`: (B, D, L) views of channels-last memory."""
    batch, channels, length, states = shape
    torch.manual_seed(0)
    args = {
        "u": torch.randn(batch, channels, length),
        "delta": torch.randn(batch, channels, length) * 0.5 - 3,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, states, length),
        "C": torch.randn(batch, states, length),
        "D": torch.randn(channels),
        "delta_bias": torch.randn(channels) * 0.1,
    }
    if last:
        args |= {name: args[name].mT.contiguous().mT for name in ("u", "delta", "B", "C")}
    return {name: x.requires_grad_(grad) for name, x in args.items()}


def cpu_ms(function: Callable[[], object], repeats: int) -> float:
    """Median process CPU time of a call, in milliseconds, after one that is not counted."""
    return side_by_side([function], repeats)[0]


def side_by_side(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """`cpu_ms` of each, called in turn so that what else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, into in zip(functions, times):
            start = time.process_time()
            function()
            into += [time.process_time() - start] if repeat else []
    return [statistics.median(x) * 1e3 for x in times]


def forward(args: dict[str, Tensor], **extra: str) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            selective_scan(**args, delta_softplus=True, **extra)

    return call


def both_ways(scan: Callable[[], Tensor], leaves: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(scan(), list(leaves.values()), torch.ones(()).expand(scan_shape(leaves)))


def scan_shape(leaves: dict[str, Tensor]) -> torch.Size:
    return leaves["u"].shape


def tree_scan_(decay: Tensor, drive: Tensor) -> None:
    """drive[t] += decay[t] drive[t-1] along dimension 1 (a power of two long), in place, log depth (Blelloch)."""
    length, step = decay.shape[1], 1
    while step < length:
        a, x = decay[:, step - 1 :: step], drive[:, step - 1 :: step]
        x[:, 1::2].add_(a[:, 1::2] * x[:, ::2])
        a[:, 1::2].mul_(a[:, ::2])
        step *= 2
    while step > 1:
        step //= 2
        a, x = decay[:, step - 1 :: step], drive[:, step - 1 :: step]
        x[:, 2::2].add_(a[:, 2::2] * x[:, 1:-1:2])
        a[:, 2::2].mul_(a[:, 1:-1:2])


class TreeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, drive):  # type: ignore[no-untyped-def]
        states = drive.clone()
        tree_scan_(decay.clone(), states)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        decay, states = ctx.saved_tensors
        shifted = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], 1).flip(1)
        grad = grad.flip(1)
        tree_scan_(shifted, grad)
        grad = grad.flip(1)
        return torch.cat([torch.zeros_like(grad[:, :1]), grad[:, 1:] * states[:, :-1]], 1), grad


def tree_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """The whole selective scan by a log-depth parallel scan written in torch."""
    dt = torch.nn.functional.softplus(delta.mT + delta_bias)
    drive = (dt * u.mT)[..., None] * B.mT[:, :, None]
    states = TreeScan.apply(torch.exp(dt[..., None] * A), drive)
    return (states @ C.mT[..., None]).squeeze(-1).mT + D[:, None] * u


def copy_scan_merge(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Four directions the field's way: x (B, H, W, C) copied in four orders to (B, 4C, L), scanned, flipped, added."""
    batch, height, width, channels = x.shape
    rows = x.permute(0, 3, 1, 2)
    pair = torch.stack([rows.flatten(2), rows.mT.flatten(2)], 1)
    sequences = torch.cat([pair, pair.flip(-1)], 1)
    y = selective_scan(sequences.flatten(1, 2), delta, A, B, C, D, delta_softplus=True).unflatten(1, (4, channels))
    pair = y[:, :2] + y[:, 2:].flip(-1)
    merged = pair[:, 0] + pair[:, 1].unflatten(-1, (width, height)).mT.flatten(2)
    return merged.mT.reshape(batch, height, width, channels)


def copy_scan_merge_last(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same with everything channels-last, (B, L, 4C) in memory, which suits this house's kernel and no other."""
    channels = x.shape[-1]
    pair = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], 2)
    sequences = torch.cat([pair, pair.flip(1)], 2).flatten(2)
    y = selective_scan(sequences.mT, delta, A, B, C, D, delta_softplus=True).mT.unflatten(2, (4, channels))
    pair = y[:, :, :2] + y[:, :, 2:].flip(1)
    columns = pair[:, :, 1].unflatten(1, (x.shape[2], x.shape[1])).transpose(1, 2)
    return pair[:, :, 0].view_as(x) + columns


def direction_ratios(shape: tuple[int, int, int, int, int], repeats: int) -> tuple[list[float], list[float]]:
    """Both forms of copy-scan-merge over the in-place form: forward, forward + backward."""
    batch, channels, height, width, states = shape
    length = height * width
    torch.manual_seed(0)
    x = torch.randn(batch, height, width, channels, requires_grad=True)
    A, D = -torch.rand(4, channels, states) * 4, torch.randn(4, channels)
    usual = [torch.randn(batch, 4 * channels, length) - 2, A.flatten(0, 1), torch.randn(batch, 4, states, length),
             torch.randn(batch, 4, states, length), D.flatten()]  # fmt: skip
    last = [v.mT.contiguous().mT if v.dim() > 2 else v for v in usual]
    place = [torch.randn(batch, 4, height, width, channels) - 2, A, torch.randn(batch, 4, height, width, states),
             torch.randn(batch, 4, height, width, states), D]  # fmt: skip
    leaves = [[x, *(v.detach().requires_grad_() for v in group)] for group in (usual, last, place)]
    calls = (
        lambda: copy_scan_merge(*leaves[0]),
        lambda: copy_scan_merge_last(*leaves[1]),
        lambda: selective_scan_directions(*leaves[2], delta_softplus=True, directions=all_directions(2)),
    )
    with torch.no_grad():
        torch.testing.assert_close(calls[0](), calls[1]())
        ahead = side_by_side(calls, repeats)
    both = side_by_side(
        [lambda c=call, g=group: torch.autograd.grad(c().sum(), g) for call, group in zip(calls, leaves)], repeats
    )
    return [t / ahead[2] for t in ahead[:2]], [t / both[2] for t in both[:2]]


def errors() -> tuple[float, float]:
    """Output and worst gradient of S1 against float64, max-norm relative (gradients: floor 1 % of the largest)."""
    sides = []
    for kind in (torch.float64, torch.float32):
        leaves = {k: v.detach().to(kind).requires_grad_() for k, v in inputs(S1, last=True).items()}
        y = selective_scan(**leaves, delta_softplus=True)
        cotangent = torch.linspace(-1, 1, y.numel()).to(kind).reshape(y.shape)
        sides.append((y.detach(), torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))))
    (y, grads), (y32, grads32) = sides
    floor = 0.01 * max(g.abs().max() for g in grads)
    worst = max(float((a - b).abs().max() / torch.maximum(a.abs().max(), floor)) for a, b in zip(grads, grads32))
    return float((y - y32).abs().max() / y.abs().max()), worst


def resident(which: str) -> float:
    """Peak growth of resident memory of one call (`forward`, `both`, `directions`) in maps; needs a fresh process."""
    Path("/proc/self/clear_refs").write_text("5")

    def read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    if which == "directions":
        leaves = [torch.randn(s) for s in ((1, 256, 256, 96), (1, 4, 256, 256, 96), (4, 96, 1), (1, 4, 256, 256, 1),
                                           (1, 4, 256, 256, 1))]  # fmt: skip
        unit = leaves[0].numel() * 4
        small = [leaves[0][:, :8], leaves[1][:, :, :8], leaves[2], leaves[3][:, :, :8], leaves[4][:, :, :8]]

        def run(v: list[Tensor]) -> object:
            return selective_scan_directions(*v, delta_softplus=True, directions=all_directions(2))

        run(small)
        selective_scan_directions(*leaves, delta_softplus=True, directions=all_directions(2))  # position table is kept
    else:
        args = inputs(S1, last=True, grad=which == "both")
        unit = args["u"].numel() * 4
        leaves = list(args.values())
        small = list(inputs((1, 96, 64, 16), last=True, grad=which == "both").values())

        def run(v: list[Tensor]) -> object:
            y = selective_scan(*v[:6], None, v[6], True)
            return (y, torch.autograd.grad(y, v, torch.ones(()).expand(y.shape))) if which == "both" else y

        run(small)
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    kept = run(leaves)
    after = read("VmHWM")
    del kept
    return (after - before) / unit


def memory(which: str) -> float | None:
    """`resident` in a fresh process whose allocator returns what is freed; None where /proc is not there."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--memory", which], capture_output=True, text=True, env=environment, check=True
    )
    return float(json.loads(done.stdout))


def row(what: str, value: float | None, must: float, aim: float, *, more: bool, form: str = ".1f") -> str:
    if value is None:
        return f"{what:72} not measured"
    verdict = ["must NOT met", "must met", "aim met"][
        (value >= must if more else value <= must) + (value >= aim if more else value <= aim)
    ]
    return f"{what:72} {value:>10{form}} {must:>9g} {aim:>9g}  {verdict}"


def speed_rows(repeats: int) -> list[str]:
    """The rows of the issue's table that are times."""
    rows = []
    loop = cpu_ms(lambda: scan_sequential(**inputs(S1, last=False), delta_softplus=True), max(1, repeats // 4))
    field, last = inputs(S1, last=False), inputs(S1, last=True)
    for name, args in (("channels-last", last), ("(B, D, L) memory", field)):
        fast = cpu_ms(forward(args), repeats)
        rows.append(row(f"forward over the per-step loop, S1, {name}", loop / fast, 60, 150, more=True))
    plain = cpu_ms(forward(field, backend="torch"), max(2, repeats // 2))
    rows.append(row("pure-torch backend over the per-step loop, S1, forward", loop / plain, 5, 10, more=True))
    grads = [inputs(S1, last=x, grad=True) for x in (True, False)]
    tree = cpu_ms(both_ways(lambda: tree_forward(**grads[1]), grads[1]), 1)
    for name, args in zip(("channels-last", "(B, D, L) memory"), grads):
        fast = cpu_ms(both_ways(lambda a=args: selective_scan(**a, delta_softplus=True), args), repeats)
        rows.append(
            row(f"forward+backward over a log-depth scan in torch, S1, {name}", tree / fast, 45, 120, more=True)
        )
    for states, shape, must, aim in ((1, (4, 192, 56, 56, 1), 3.5, 5), (16, (1, 96, 128, 128, 16), 2.5, 3)):
        ahead, both = direction_ratios(shape, repeats)
        rows.append(row(f"four directions over copy-scan-merge, N = {states}, forward", ahead[0], must, aim, more=True))
        rows.append(row(f"four directions, N = {states}, forward+backward", both[0], 1.8, 3, more=True))
        rows.append(
            f"{'  the same over channels-last copies (forward; forward+backward)':72} {ahead[1]:>10.1f} {both[1]:.1f}"
        )
    args = inputs(S3, last=True)
    source = torch.randn(args["u"].numel() * 3 // 2)
    scan, copy = side_by_side([forward(args), source.clone], 3 * repeats)
    rows.append(row("N = 1 forward over a copy (clone) of the same bytes, S3", scan / copy, 6, 2, more=False))
    rows.append(row("length doubles, 4k to 64k, worst step of forward+backward", scaling(repeats), 2.2, 2.05,
                    more=False, form=".2f"))  # fmt: skip
    return rows


def scaling(repeats: int) -> float:
    times = []
    for length in (4096, 8192, 16384, 32768, 65536):
        args = inputs((1, 96, length, 16), last=True, grad=True)
        times.append(cpu_ms(both_ways(lambda a=args: selective_scan(**a, delta_softplus=True), args), repeats))
    return max(b / a for a, b in itertools.pairwise(times))


def two_threads(repeats: int) -> str:
    """Wall time of S1 forward with one thread over two; held to 1.7 only on a quiet machine."""
    if os.getloadavg()[0] > 1.2 or (os.cpu_count() or 1) < 2:
        return f"{'two threads over one, S1 forward, wall':72} not measured (machine is busy)"
    args, walls = inputs(S1, last=True), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        forward(args)()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            forward(args)()
            times.append(time.perf_counter() - start)
        walls.append(statistics.median(times))
    torch.set_num_threads(1)
    return row("two threads over one, S1 forward, wall", walls[0] / walls[1], 1.7, 1.9, more=True, form=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--memory", choices=("forward", "both", "directions"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(resident(options.memory)))
        return
    repeats = 3 if options.quick else 9
    print(machine())
    print(", ".join(f"{key}: {value}" for key, value in backend_report().items()))
    print(f"{'':72} {'measured':>10} {'must':>9} {'aim':>9}")
    two = two_threads(repeats)
    for line in speed_rows(repeats):
        print(line)
    for which, must, aim in (("forward", 1.1, 1.0), ("both", 4.5, 4.0), ("directions", 1.2, 1.0)):
        label = {"forward": "extra maps, S1 forward (output included)", "both": "extra maps, S1 forward+backward",
                 "directions": "extra maps, four directions forward, N = 1 (output included)"}[which]  # fmt: skip
        print(row(label, memory(which), must, aim, more=False, form=".2f"))
    output, gradient = errors()
    print(row("error to float64, output, L = 32768", output, 1e-6, 2e-7, more=False, form=".1e"))
    print(row("error to float64, worst gradient, L = 32768", gradient, 2e-5, 1e-6, more=False, form=".1e"))
    print(two)


if __name__ == "__main__":
    main()
