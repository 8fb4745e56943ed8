"""Ways down and up that lose nothing: a lifted Haar transform of all channels, or a split of the channels.

Letters: B batch, C channels of a state (C / 2 a half), P product of the strides. Streams are (B, *space, C / 2).
Both give halves of C channels (2C together) on the coarser map and leave the rest as skip streams behind them; the way
up is the exact inverse (`reversible.Undone`). Lifting: Sweldens, "The Lifting Scheme" (1996); on a grid it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.grid import Snap, dense
from medmamba.layers.reversible import Invertible, State


def lift(stream: Tensor, axis: int, stride: int, snap: Snap) -> list[Tensor]:
    """[mean, details ...]: of every `stride` neighbours along `axis` the first, d[i] = x[i] - x[0], and
    mean = x[0] + snap(sum(d) / stride)."""
    first, *others = stream.unflatten(axis, (-1, stride)).unbind(axis + 1)
    details = [other - first for other in others]
    return [first + snap(total(details) / stride), *details]


def unlift(bands: Sequence[Tensor], axis: int, snap: Snap) -> Tensor:
    """The inverse of `lift`."""
    mean, *details = bands
    first = mean - snap(total(details) / len(bands))
    return torch.stack([first, *(first + d for d in details)], dim=axis + 1).flatten(axis, axis + 1)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum, in order."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


class Down(Invertible):
    """A way down with one stride per axis; knows how many skip streams it leaves."""

    skips: int

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = self.unit = tuple(strides)
        self.cells = math.prod(self.strides)
        if self.cells < 2:
            raise ConfigError(f"strides {self.strides}: a way down wants a stride above 1 on one axis")

    def check(self, stream: Tensor) -> None:
        """Raises ShapeError when the map does not fall into whole cells."""
        space = tuple(stream.shape[1:-1])
        if len(space) != len(self.strides) or any(n % s for n, s in zip(space, self.strides)):
            raise ShapeError(f"a map of {space} does not fall into cells of {self.strides}; pad it to a multiple")


class HaarDown(Down):
    """All channels go down: the mean band becomes half a, the first detail band half b, the others are the skips."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        self.skips = 2 * (self.cells - 2)
        self.gives = 2 + self.skips

    def forward(self, state: State, snap: Snap) -> State:
        a, b, *rest = state
        self.check(a)
        (low_a, high_a, *skips_a), (low_b, high_b, *skips_b) = self._bands(a, snap), self._bands(b, snap)
        return torch.cat([low_a, low_b], -1), torch.cat([high_a, high_b], -1), *skips_a, *skips_b, *rest

    def inverse(self, state: State, snap: Snap) -> State:
        low, high, skips = state[0], state[1], state[2 : 2 + self.skips]
        halves = zip(low.chunk(2, -1), high.chunk(2, -1), (skips[: self.skips // 2], skips[self.skips // 2 :]))
        a, b = (self._joined([l, h, *s], snap) for l, h, s in halves)
        return a, b, *state[2 + self.skips :]

    def _bands(self, stream: Tensor, snap: Snap) -> list[Tensor]:
        bands = [stream]
        for axis, stride in self._axes():
            bands = [band for old in bands for band in lift(old, axis, stride, snap)]
        return bands

    def _joined(self, bands: list[Tensor], snap: Snap) -> Tensor:
        for axis, stride in reversed(self._axes()):
            bands = [unlift(bands[i : i + stride], axis, snap) for i in range(0, len(bands), stride)]
        return bands[0]

    def _axes(self) -> list[tuple[int, int]]:
        return [(axis, stride) for axis, stride in enumerate(self.strides, start=1) if stride > 1]


class SplitDown(Down):
    """The last 2C / P channels go down by space-to-depth (channel by channel), the others are one skip stream."""

    skips = 1
    gives = 3

    def forward(self, state: State, snap: Snap) -> State:
        a, b, *rest = state
        self.check(a)
        moving = 2 * (a.shape[-1] + b.shape[-1]) // self.cells
        if moving * self.cells != 2 * (a.shape[-1] + b.shape[-1]):
            raise ConfigError(f"{a.shape[-1] + b.shape[-1]} channels cannot be split for strides {self.strides}")
        both = torch.cat([a, b], -1)
        skip, moved = both.split([both.shape[-1] - moving, moving], dim=-1)
        for axis, stride in reversed(list(enumerate(self.strides, start=1))):
            moved = moved.unflatten(axis, (-1, stride))
        rank = len(self.strides)
        coarse, inside = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
        a, b = moved.permute(0, *coarse, 2 * rank + 1, *inside).flatten(rank + 1).chunk(2, dim=-1)
        return dense(a), dense(b), dense(skip), *rest

    def inverse(self, state: State, snap: Snap) -> State:
        a, b, skip, *rest = state
        rank = len(self.strides)
        moved = torch.cat([a, b], -1).unflatten(-1, (-1, *self.strides))
        pairs = [place for axis in range(1, rank + 1) for place in (axis, axis + rank + 1)]
        moved = moved.permute(0, *pairs, rank + 1)
        for axis in range(1, rank + 1):
            moved = moved.flatten(axis, axis + 1)
        halves = torch.cat([skip, moved], -1).chunk(2, dim=-1)
        return dense(halves[0]), dense(halves[1]), *rest


DOWN: dict[str, type[Down]] = {"haar": HaarDown, "split": SplitDown}
