"""What a streamed network is made of: passes over the rows of maps, each saying what it reads, writes and carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medmamba.layers.need import Need

IMAGE, SCORES = "image", "scores"
Rows = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A map (1, *space, channels) that a pass writes and later ones read. The image may be seen mirrored along the
    axes `turn`."""

    name: str
    space: tuple[int, ...]
    channels: int
    turn: tuple[int, ...] = ()

    @property
    def row(self) -> tuple[int, ...]:
        return (*self.space[1:], self.channels)

    @property
    def numbers(self) -> int:
        return math.prod(self.space) * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a slab stands: `rows` are its own inside what was read of the first stream (a halo more), `starts` the
    first row read of each stream. States: that which its pass carried to it, that which the sweep left behind it, that
    which the sweep left in the end, and what the passes of `sums` left."""

    rows: slice
    starts: tuple[int, ...] = ()
    carried: Tensor | None = None
    behind: Tensor | None = None
    whole: Tensor | None = None
    sums: tuple[Tensor, ...] = ()


Work = Callable[[list[Tensor], Place], tuple[Sequence[Tensor], Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`work` on slabs of the streams it `reads`: of the first with the halo of `need`, of the others with `halos`
    (none: 0); slabs begin at multiples of `need.unit` of the first one's rows. `state` is the shape of what it carries
    on (`state_dtype`; None: that of the maps), `sweep` the pass whose states it reads, `sums` those whose last state,
    and nobody wants what it `frees` afterwards. `mirror`: rows of the streams after the first count back from there."""

    name: str
    reads: tuple[Stream, ...]
    writes: tuple[Stream, ...]
    work: Work
    need: Need
    halos: tuple[int, ...] = ()
    backward: bool = False
    state: tuple[int, ...] = ()
    state_dtype: torch.dtype | None = None
    sweep: Pass | None = None
    sums: tuple[Pass, ...] = ()
    frees: tuple[Stream, ...] = ()
    mirror: int = 0

    def slabs(self, rows: int) -> list[Rows]:
        """Row ranges of the first stream, from the first to the last: about `rows` each of the finest stream."""
        every, finest = self.reads[0].space[0], max(s.space[0] for s in (*self.reads, *self.writes))
        step = max(1, rows * every // finest // self.need.unit) * self.need.unit
        return [(start, min(start + step, every)) for start in range(0, every, step)]

    def order(self, rows: int) -> list[int]:
        """Numbers of the slabs as the pass takes them."""
        numbers = range(len(self.slabs(rows)))
        return list(reversed(numbers)) if self.backward else list(numbers)

    def part(self, stream: Stream, rows: Rows) -> Rows:
        """The rows of another stream that belong to rows of the first."""
        every, own = self.reads[0].space[0], stream.space[0]
        return rows[0] * own // every, rows[1] * own // every

    def shown(self, rows: Rows) -> list[Rows]:
        """The rows to read of each stream for own rows of the first."""
        first, *others = (self.part(stream, rows) for stream in self.reads)
        if self.mirror:
            others = [(max(0, self.mirror - high), max(0, self.mirror - low)) for low, high in others]
        halos = (self.need.halo, *self.halos, *(0 for _ in others))
        wanted = zip(self.reads, (first, *others), halos)
        return [(max(0, low - halo), min(stream.space[0], high + halo)) for stream, (low, high), halo in wanted]
