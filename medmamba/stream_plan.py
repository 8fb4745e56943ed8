"""A network turned into passes over the rows of an image: what each reads, writes and carries, and in which order.

Layers declare what they want (`layers.need`, `Step.takes`, `Step.unit`). A coupling without a mixer is one pass with a
halo, one with a mixer two: a sweep from the last slab to the first, which leaves the state behind every slab and the
sum over all of them, and a pass from the first to the last. Ways down and up are cut at multiples of the stride of
their level. Rows run along the first spatial axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.grid import Snap
from medmamba.layers.nd import channels_first, channels_last
from medmamba.layers.need import Need, need_of
from medmamba.layers.reversible import Add, Step

IMAGE, SCORES = "image", "scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A map (1, *space, channels) that a pass writes and later ones read."""

    name: str
    space: tuple[int, ...]
    channels: int

    @property
    def row(self) -> tuple[int, ...]:
        return (*self.space[1:], self.channels)

    @property
    def numbers(self) -> int:
        return math.prod(self.space) * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a slab stands: `rows` are its own inside what was read (a halo more). States: that which its pass carried
    to it, that which the sweep left behind it, and that which the sweep left in the end."""

    rows: slice
    carried: Tensor | None = None
    behind: Tensor | None = None
    whole: Tensor | None = None


Work = Callable[[list[Tensor], Place], tuple[Sequence[Tensor], Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`work` on slabs of the streams it `reads`, the first of them with a halo; slabs begin at multiples of `need.unit`
    of its rows. `state` is the shape of what it carries on, `sweep` the pass whose states it reads, and nobody wants
    what it `frees` afterwards."""

    name: str
    reads: tuple[Stream, ...]
    writes: tuple[Stream, ...]
    work: Work
    need: Need
    backward: bool = False
    state: tuple[int, ...] = ()
    sweep: Pass | None = None
    frees: tuple[Stream, ...] = ()

    def slabs(self, rows: int) -> list[tuple[int, int]]:
        """Row ranges of the first stream, from the first to the last: about `rows` each of the finest stream."""
        every, finest = self.reads[0].space[0], max(s.space[0] for s in (*self.reads, *self.writes))
        step = max(1, rows * every // finest // self.need.unit) * self.need.unit
        return [(start, min(start + step, every)) for start in range(0, every, step)]

    def order(self, rows: int) -> list[int]:
        """Numbers of the slabs as the pass takes them."""
        numbers = range(len(self.slabs(rows)))
        return list(reversed(numbers)) if self.backward else list(numbers)

    def part(self, stream: Stream, rows: tuple[int, int]) -> tuple[int, int]:
        """The rows of another stream that belong to rows of the first."""
        every, own = self.reads[0].space[0], stream.space[0]
        return rows[0] * own // every, rows[1] * own // every


@torch.no_grad()
def plan(network: nn.Module, channels: int, space: Sequence[int]) -> list[Pass]:
    """The passes of `network` over an image of `space` cells; the last one writes the scores.

    Raises ConfigError naming a part that cannot stream.
    """
    image = Stream(name=IMAGE, space=tuple(space), channels=channels)
    network.eval()
    make = _stepped if hasattr(network, "stem") and hasattr(network, "body") else _chain
    passes: list[Pass] = make(network, image)
    last = {stream.name: number for number, p in enumerate(passes) for stream in (*p.reads, *p.writes)}
    done = [
        tuple(s for s in (*p.reads, *p.writes) if last[s.name] == number and s.name not in (IMAGE, SCORES))
        for number, p in enumerate(passes)
    ]
    return [replace(p, frees=freed) for p, freed in zip(passes, done, strict=True)]


def require_streamable(network: nn.Module, channels: int, rank: int) -> None:
    """Raises ConfigError naming the part of `network` that cannot stream."""
    plan(network, channels, multiple(network, rank))


def multiple(network: Any, rank: int) -> tuple[int, ...]:
    """The sizes of an image are padded at the far ends to multiples of these."""
    return tuple(network.config.multiple) if hasattr(network, "body") else (1,) * rank


def scratch_numbers(passes: Sequence[Pass]) -> int:
    """How many numbers stand on the disk at once, at most."""
    held = peak = 0
    for p in passes:
        held += sum(s.numbers for s in p.writes if s.name != SCORES)
        peak = max(peak, held)
        held -= sum(s.numbers for s in p.frees)
    return peak


def _chain(network: nn.Module, image: Stream) -> list[Pass]:
    """Layers one after another without state: one pass with the halo of all of them."""
    need = need_of(network, "")
    if need.state or need.statistics or not isinstance(network, nn.Sequential):
        raise ConfigError(f"{type(network).__name__} does not say in which order its parts work; it cannot be streamed")

    def work(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [channels_last(network(channels_first(parts[0])))[:, at.rows]], None

    (scores,) = _made(SCORES, lambda parts: work(parts, Place(rows=slice(None)))[0], (image,), (), network)
    return [Pass(name="chain", reads=(image,), writes=(scores,), work=work, need=need)]


def _stepped(network: Any, image: Stream) -> list[Pass]:
    """A stem, a body of steps on a state of streams, and a head."""
    snap: Snap = network.grid()

    def stem(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [half[:, at.rows] for half in network.stem(channels_first(parts[0]), snap)], None

    def head(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [network.body.head(tuple(parts))], None

    state = _made("stem", lambda parts: stem(parts, Place(rows=slice(None)))[0], (image,), (), network)
    passes = [Pass(name="stem", reads=(image,), writes=state, work=stem, need=need_of(network.stem, "stem"))]
    for number, step in enumerate(network.body.steps):
        make = _coupling if isinstance(step, Add) else _change
        state, more = make(f"body.steps.{number}", step, state, snap)
        passes += more
    (scores,) = _made(SCORES, lambda parts: [network.body.head(tuple(parts))], state[:2], (), network)
    need = need_of(network.body.head, "body.head")
    return [*passes, Pass(name="head", reads=state[:2], writes=(scores,), work=head, need=need)]


def _coupling(name: str, step: Add, state: tuple[Stream, ...], snap: Snap) -> tuple[tuple[Stream, ...], list[Pass]]:
    """The state after a coupling, and the passes that make it: one, or two when its branch has a mixer."""
    branch: Any = step.branch
    source, into = state[1 - step.into], state[step.into]
    made = replace(into, name=name)
    after = (made, *state[1:]) if step.into == 0 else (state[0], made, *state[2:])
    need, mixer = need_of(branch, f"{name}.branch"), branch.mixer
    if mixer is None:

        def add(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
            return [parts[1] + snap(branch(parts[0])[:, at.rows])], None

        return after, [Pass(name=name, reads=(source, into), writes=(made,), work=add, need=need)]

    cells = math.prod(into.space)
    mixed = Stream(name=f"{name}.mixed", space=into.space, channels=mixer.width)

    def gather(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], Tensor]:
        t = branch.before_mixer(parts[0])[:, at.rows].contiguous()
        return [t], mixer.gather(t, at.carried)

    def mix(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], Tensor | None]:
        t, old = parts
        y, ahead = mixer.stream(t, at.carried, at.behind, at.whole, cells)
        return [old + snap(branch.out(t + y))], ahead

    cell = next(mixer.parameters()).new_zeros((1,) * len(source.space) + (1, source.channels))
    left = tuple(gather([cell], Place(rows=slice(None)))[1].shape)
    sweep = Pass(
        name=f"{name}.sweep", reads=(source,), writes=(mixed,), work=gather, need=need, backward=True, state=left
    )
    ahead = left if need.state else ()
    own = replace(need, halo=0)
    return after, [
        sweep,
        Pass(name=name, reads=(mixed, into), writes=(made,), work=mix, need=own, state=ahead, sweep=sweep),
    ]


def _change(name: str, step: Step, state: tuple[Stream, ...], snap: Snap) -> tuple[tuple[Stream, ...], list[Pass]]:
    """The state after a way down or up, and the pass that makes it; streams that it hands through stay as they are."""

    def work(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [new for new in step(tuple(parts), snap) if all(new is not old for old in parts)], None

    reads, unit = state[: step.takes], step.unit
    made = _made(name, lambda parts: step(tuple(parts), snap), reads, unit, step)
    writes = tuple(s for s in made if s not in reads)
    one = Pass(name=name, reads=reads, writes=writes, work=work, need=Need(unit=unit[0] if unit else 1))
    return (*made, *state[step.takes :]), [one]


def _made(
    name: str,
    work: Callable[[list[Tensor]], Sequence[Tensor]],
    reads: tuple[Stream, ...],
    unit: tuple[int, ...],
    module: nn.Module,
) -> tuple[Stream, ...]:
    """The streams that come out, their shapes learned from the smallest piece: `unit` cells of the first stream."""
    first = reads[0].space
    small = unit or (1,) * len(first)
    sizes = [[n * u // f for n, u, f in zip(s.space, small, first, strict=True)] for s in reads]
    like = next(module.parameters(), torch.empty(0))
    parts = [like.new_zeros(1, *size, s.channels) for size, s in zip(sizes, reads, strict=True)]
    streams = []
    for number, out in enumerate(work(parts)):
        same = [s for s, part in zip(reads, parts, strict=True) if out is part]
        space = tuple(n * f // u for n, f, u in zip(out.shape[1:-1], first, small, strict=True))
        name_here = name if name == SCORES else f"{name}.{number}"
        streams.append(same[0] if same else Stream(name=name_here, space=space, channels=out.shape[-1]))
    return tuple(streams)
