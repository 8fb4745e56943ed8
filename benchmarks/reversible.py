"""Memory, exactness and time of reversible networks: `python benchmarks/reversible.py [--quick]`.

One map = bytes of one full-resolution feature map of the first width. Held bytes: what autograd saves between forward
and backward (hooks); live bytes: tensor storage, operation by operation; weights, their gradients, image and labels are
not counted. Times: process CPU of one thread, medians, ratios within this run. C = 16 and 3 classes unless said.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from scan import row
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmamba.layers.grid import Snap
from medmamba.layers.mixers import MIXERS
from medmamba.layers.onednn import one_dnn
from medmamba.layers.reversible import State, Step
from medmamba.memory import held_bytes, largest_patch, measure, predict, without_data
from medmamba.nets.mamba_unet import MambaUNet, MambaUNetConfig
from medmamba.nets.reversible_mbconv_unet import ReversibleMBConvUNet, ReversibleMBConvUNetConfig

C, K = 16, 3
DEEPEST, BASE = 16, (64, 64, 64)


def config(levels: int = 3, depth: int = 2, width: int = C, **settings: Any) -> MambaUNetConfig:
    """A flagship with `depth` couplings at each level, way down and way up."""
    widths = tuple(width * 2**i for i in range(levels))
    return MambaUNetConfig(
        **{"out_channels": K, "mixer": "none", "widths": widths, "depths": (depth,) * levels, **settings}
    )


def maps(value: int, space: tuple[int, ...]) -> float:
    return value / (4 * C * torch.Size(space).numel())


def data(space: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 1, *space), torch.randint(0, K, (batch, *space))


def held_by_body(network: MambaUNet, space: tuple[int, ...]) -> int:
    network.body.head = None
    snap = network.grid()
    state = network.stem(data(space)[0], snap)
    with held_bytes() as held:
        last = network.body(state, snap, "full")
    assert len(last) == 2
    return held.bytes


def memory_rows(quick: bool) -> Iterator[str]:
    space = (16, 16, 16)
    depths, levels = ((1, 4), (1, 3)) if quick else ((1, 2, 4, 8, 16), (1, 2, 3, 4))
    shapes = [*((n, 2) for n in depths), *((1, n) for n in levels)]
    cases = [*((n, v, "none") for n, v in shapes), *((1, 2, m) for m in MIXERS)]
    found = {held_by_body(MambaUNet(config(v, n, mixer=m, mixer_from=0)), space) for n, v, m in cases}
    label = f"held by the body, {len(cases)} bodies: depth 1..{depths[-1]}, levels 1..{levels[-1]}, 6 mixers"
    yield row(f"{label} (most)", maps(max(found), space), 1, 1, more=False, form=".4f")
    yield row("the same, difference between most and least, bytes", max(found) - min(found), 0, 0, more=False, form="d")
    space = (16, 16, 16) if quick else (32, 32, 32)
    whole = measure(MambaUNet(config()), *data(space))
    limit = 1 + 2 * (K + 1) / C
    yield row("held by the whole network with its loss", maps(whole.held, space), limit, limit, more=False, form=".3f")
    for name, network in (
        ("no mixer", config()), ("no mixer, 4 levels", config(4)), ("no mixer, first stride (1,2,2)",
         config(strides=((1, 2, 2), (2, 2, 2)))), ("no mixer, split down", config(down="split")),
        *((f"{m} from level 1", config(depth=1, mixer=m)) for m in MIXERS),
    ):  # fmt: skip
        peak = measure(MambaUNet(network), *data(space)).peak
        yield row(f"peak, {name}", maps(peak, space), 8, 6, more=False, form=".2f")
    for mixer in MIXERS:
        peak = measure(MambaUNet(config(depth=1, mixer=mixer, mixer_from=0)), *data(space)).peak
        yield row(f"peak, {mixer} at full resolution", maps(peak, space), 16, 10, more=False, form=".2f")
    for depth, must, aim in ((4, 6, 6.8), (8, 12, 13.6)):
        costs = [measure(MambaUNet(config(depth=depth), memory=m), *data(space)) for m in ("stored", "stages", "full")]
        told = f"stored {maps(costs[0].peak, space):.1f}, stages {maps(costs[1].peak, space):.1f} maps"
        label = f"stored peak / full peak, {depth} couplings a level ({told})"
        yield row(label, costs[0].peak / costs[2].peak, must, aim, more=True, form=".1f")


def gradients(network: nn.Module, memory: str, space: tuple[int, ...], batch: int) -> list[Tensor]:
    network.memory = memory
    network.zero_grad()
    image, labels = data(space, batch)
    with one_dnn(image):  # as the training loop
        F.cross_entropy(network(image), labels).backward()
    return [p.grad.clone() for p in network.parameters()]


def exactness_rows() -> Iterator[str]:
    cases = [
        (config(v, n, width=8, mixer=m, mixer_from=0, branch=b, down=d, spatial_dims=len(s)), s, batch)
        for v, n, m, b, d, s, batch in (
            *((2, 1, m, "dense", "haar", (8, 8, 8), 1) for m in (*MIXERS, "none")),
            (2, 1, "s6", "grouped", "haar", (8, 12), 2), (2, 2, "vssd", "inverted", "split", (8, 12), 1),
            (3, 4, "none", "dense", "haar", (16, 16, 16), 1), (3, 2, "none", "dense", "split", (16, 16, 16), 2),
        )
    ]  # fmt: skip
    equal = 0
    for settings, space, batch in cases:
        network = MambaUNet(settings)
        truth = gradients(network, "stored", space, batch)
        for memory in ("stages", "full"):
            equal += all(map(torch.equal, gradients(network, memory, space, batch), truth))
    label = f"gradients, snapped: runs bitwise those of stored, of {2 * len(cases)}"
    yield row(label, equal, 2 * len(cases), 2 * len(cases), more=True, form="d")
    worst = 0.0
    for settings, space, batch in cases:
        network = MambaUNet(replace(settings, coupling="plain"))
        pairs = zip(gradients(network, "full", space, batch), gradients(network, "stored", space, batch), strict=True)
        largest = max(float(g.norm()) for g in gradients(network, "stored", space, batch))
        worst = max(worst, *(float((x - y).norm()) / max(float(y.norm()), 1e-3 * largest) for x, y in pairs))
    yield row("gradients, plain couplings: worst parameter, relative", worst, 1e-4, 1e-5, more=False, form=".1e")


def time_rows(repeats: int) -> Iterator[str]:
    for name, settings, space in (
        ("no mixer, 32^3", config(), (32, 32, 32)),
        ("s6 from level 1, 32^3", config(mixer="s6"), (32, 32, 32)),
        ("no mixer, 256^2", config(spatial_dims=2), (256, 256)),
    ):
        network, spent = MambaUNet(settings), dict[str, list[float]]()
        for _, memory in itertools.product(range(repeats + 1), ("stored", "full")):
            start = time.process_time()
            gradients(network, memory, space, 1)
            spent.setdefault(memory, []).append(time.process_time() - start)
        stored, full = (statistics.median(times[1:]) for times in spent.values())
        yield row(
            f"time full / stored, {name} (stored {stored:.2f} s)", full / stored, 1.5, 1.25, more=False, form=".2f"
        )


class Checkpointed(Step):
    """A step that keeps its input and runs again in the backward pass (torch's own checkpointing)."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, state: State, snap: Snap) -> State:
        unwatched = Snap(snap.step, None)
        return checkpoint(self.step, state, unwatched, use_reentrant=False, preserve_rng_state=False)


def checkpointed(network: nn.Module) -> nn.Module:
    """The stored network with every step checkpointed."""
    network.memory = "stored"
    network.body.steps = nn.ModuleList(Checkpointed(step) for step in network.body.steps)
    return network


def budget_rows() -> Iterator[str]:
    """What fits in the bytes that the plain network takes for one step on 64^3 (AdamW's copies of weights counted)."""

    def mbconv(depth: int = 2, width: int = C, **_: Any) -> nn.Module:
        widths = tuple(width * 2**i for i in range(3))
        return ReversibleMBConvUNet(ReversibleMBConvUNetConfig(in_channels=1, widths=widths, depths=(depth,) * 3))

    def flagship(depth: int = 2, width: int = C, down: str = "haar") -> nn.Module:
        return MambaUNet(config(depth=depth, width=width, down=down))

    def twin(**sizes: Any) -> nn.Module:
        return flagship(**sizes, down="strided")

    tables = {
        "inverted-bottleneck U-Net": {
            "plain": (mbconv, "stored"),
            "checkpointed": (mbconv, None),
            "stages": (mbconv, "stages"),
        },
        "flagship": {
            "plain": (twin, "stored"),
            "checkpointed": (twin, None),
            "stages": (flagship, "stages"),
            "full": (flagship, "full"),
        },
    }
    for name, kinds in tables.items():
        make, memory = kinds["plain"]
        budget = predict(without_data(make), (1, 1, *BASE), memory=memory).total
        yield f"\n{name}, budget {budget >> 20} MiB: {'voxels':>22} {'couplings a level':>18} {'channels':>9}"
        for kind, (make, memory) in kinds.items():
            voxels, depth, width = within(make, memory, budget)
            times = voxels / torch.Size(BASE).numel()
            deep = f"{depth}{'+' if depth == DEEPEST else ''}"
            yield f"    {kind:36} {round(voxels ** (1 / 3)):>8}^3 = {times:4.1f} x {deep:>18} {width:>9}"
        best = max(times, depth / 2, width / C * 2)  # the last kind is the most sparing
        must, aim = (3, 4) if name != "flagship" else (4, 6)
        yield row(f"{name}: largest volume over plain", times, must, aim, more=True)
        yield row(f"{name}: best of volume, depth (of 2), twice channels (of {C}), over plain", best, 4, 6, more=True)


def within(make: Callable[..., nn.Module], memory: str | None, budget: int) -> tuple[int, int, int]:
    """Largest voxels, depth and width at the other's base that fit the budget."""

    def network(**sizes: int) -> nn.Module:
        return without_data(lambda: make(**sizes) if memory else checkpointed(make(**sizes)))

    def fits(**sizes: int) -> bool:
        return predict(network(**sizes), (1, 1, *BASE), memory=memory).total <= budget

    patch, _ = largest_patch(network(), budget, memory=memory)
    depth = max(n for n in (2, 3, 4, 6, 8, DEEPEST) if n == 2 or fits(depth=n))
    width = max(w for w in (16, 20, 24, 32, 40, 48, 64, 80) if w == C or fits(width=w))
    return torch.Size(patch).numel(), depth, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller volumes, fewer repetitions, no budget table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(f"{'':72} {'measured':>10} {'must':>9} {'aim':>9}")
    rows = [memory_rows(options.quick), exactness_rows(), time_rows(1 if options.quick else 5)]
    for line in itertools.chain(*rows, () if options.quick else budget_rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
