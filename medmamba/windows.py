"""Cut any shape into windows, weigh, stitch, and hand on finished slabs; any rank.

Per axis of length n, window w, overlap o: starts 0, w-o, 2(w-o), ..., last at n-w. Windows come in C order, so when one
starts at row s of axis 0, all rows below s are final.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from medmamba.errors import ConfigError, GeometryError


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A box of index space: first cell and number of cells, array order. `start` may be negative only before `clip`."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Window:
        return cls(start=(0,) * len(shape), size=tuple(shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.size, strict=True))

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(s + n for s, n in zip(self.start, self.size, strict=True))

    def clip(self, shape: Sequence[int]) -> Window:
        """The part that lies inside an array of `shape`."""
        return self.within(Window.whole(shape))

    def within(self, box: Window) -> Window:
        """The part that lies inside another box."""
        start = tuple(min(max(s, a), b) for s, a, b in zip(self.start, box.start, box.stop, strict=True))
        stop = tuple(min(max(e, a), b) for e, a, b in zip(self.stop, box.start, box.stop, strict=True))
        return Window(start=start, size=tuple(max(e - s, 0) for s, e in zip(start, stop, strict=True)))

    def moved(self, by: Sequence[int]) -> Window:
        """The same box `by` cells further."""
        return Window(start=tuple(s + b for s, b in zip(self.start, by, strict=True)), size=self.size)

    def below(self, row: int) -> Window:
        """The same box from row `row` of axis 0 on, when it begins before that."""
        top = min(max(self.start[0], row), self.stop[0])
        return Window(start=(top, *self.start[1:]), size=(self.stop[0] - top, *self.size[1:]))

    def columns(self, start: int, stop: int) -> Window:
        """The same box, only the columns start..stop of axis 1."""
        first, _, *rest = zip(self.start, self.size, strict=True)
        starts, sizes = zip(first, (start, stop - start), *rest, strict=True)
        return Window(start=starts, size=sizes)

    def scaled(self, factor: Sequence[float]) -> Window:
        """The smallest window that covers this one after every axis is multiplied by `factor`."""
        start = tuple(int(np.floor(s * f)) for s, f in zip(self.start, factor, strict=True))
        stop = tuple(int(np.ceil(e * f)) for e, f in zip(self.stop, factor, strict=True))
        return Window(start=start, size=tuple(e - s for s, e in zip(start, stop, strict=True)))

    def require_inside(self, shape: Sequence[int]) -> None:
        """Raises GeometryError when any cell lies outside an array of `shape`."""
        if len(shape) != len(self.start) or self.clip(shape) != self:
            raise GeometryError(f"window start {self.start} size {self.size} leaves the image of shape {tuple(shape)}")


def gaussian_weights(n: int, overlap: int) -> np.ndarray:
    """MONAI's and nnU-Net's importance map along one axis: sigma = n/8, centre 1."""
    position = np.arange(n) - (n - 1) / 2
    return np.exp(-0.5 * (position / (0.125 * n)) ** 2)


def ramp_weights(n: int, overlap: int) -> np.ndarray:
    """Linear rise over the overlap, 1 inside, never 0."""
    i = np.arange(n)
    return np.minimum(1.0, np.minimum((i + 1) / (overlap + 1), (n - i) / (overlap + 1)))


WEIGHTS = {"gaussian": gaussian_weights, "ramp": ramp_weights}
LEAST_WEIGHT = 1e-3  # MONAI's floor for the product of the Gaussian axes
PIECE_BYTES = 2 << 20  # of scores handed on at a time: what follows works in the processor's cache


def network_size(window: Sequence[int]) -> tuple[int, ...]:
    """A window as the network sees it: one plane (1, h, w) of a volume is shown to a 2D network as (h, w)."""
    return tuple(window[1:] if len(window) == 3 and window[0] == 1 else window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowing:
    """How an image is cut: window `size` and `overlap` in cells per axis, blending `weights`, `pad` where too small.

    A window without one valid cell, or with no value above `skip_below` (after preprocessing; None: no such rule), is
    not shown to the network: its scores are 0, so it is background.
    """

    size: tuple[int, ...]
    overlap: tuple[int, ...]
    weights: str = "gaussian"
    pad: str = "edge"
    skip_below: float | None = None

    def __post_init__(self) -> None:
        if len(self.size) != len(self.overlap):
            raise ConfigError(f"window size {self.size} and overlap {self.overlap} have different ranks")
        if any(not 0 <= o < w for w, o in zip(self.size, self.overlap, strict=True)):
            raise ConfigError(f"overlap {self.overlap} must lie in 0..size-1 of {self.size} on each axis")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"window weights {self.weights!r} unknown; known: {', '.join(WEIGHTS)}")

    @property
    def network_size(self) -> tuple[int, ...]:
        """The window as the network sees it (`network_size`)."""
        return network_size(self.size)

    def starts(self, shape: Sequence[int]) -> list[list[int]]:
        """Starts per axis for an image at least as large as the window."""
        return [axis_starts(n, w, o) for n, w, o in zip(shape, self.size, self.overlap, strict=True)]

    def windows(self, shape: Sequence[int]) -> list[Window]:
        """All windows in C order."""
        return [Window(start=start, size=self.size) for start in product(*self.starts(shape))]

    def strips(self, shape: Sequence[int], width: int | None) -> list[tuple[Window, Window]]:
        """Boxes of all rows and about `width` columns (axis 1; None: all), to be made one after another: what is seen,
        and what of it becomes final. Cut where a window begins; windows that two strips need belong to both, so that
        every cell is made of the same windows as without strips."""
        whole = Window.whole(shape)
        if width is None or len(shape) == 1:
            return [(whole, whole)]
        starts, w, columns = self.starts(shape)[1], self.size[1], shape[1]
        most = max(1, width // (w - self.overlap[1]))
        found = []
        for first in range(0, len(starts), most):
            low, high = starts[first], columns if first + most >= len(starts) else starts[first + most]
            needed = [start for start in starts if low - w < start < high]
            found.append((whole.columns(needed[0], needed[-1] + w), whole.columns(low, high)))
        return found

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Blending weight of one window, shape `size`."""
        weight = torch.ones((), dtype=torch.float64)
        for w, o in zip(self.size, self.overlap, strict=True):
            weight = weight.unsqueeze(-1) * torch.from_numpy(WEIGHTS[self.weights](w, o))
        return weight.clamp_min(LEAST_WEIGHT).to(dtype)


def axis_starts(n: int, w: int, o: int) -> list[int]:
    """Window starts on an axis of `n` cells, window `w`, overlap `o`; the last one ends at n. Needs n >= w."""
    if n < w:
        raise GeometryError(f"axis of {n} cells is shorter than the window of {w}; pad it first")
    starts = list(range(0, n - w + 1, w - o))
    return starts if starts[-1] == n - w else [*starts, n - w]


class Stitcher:
    """Weighted mean of overlapping windows, kept only for the rows that a later window can still touch.

    `add` takes windows in C order and yields finished slabs `(window, scores (K, rows, ...))` in pieces of about
    PIECE_BYTES; `finish` the rest. Holds K * window depth * plane numbers, whatever the length of axis 0: how much
    weight fell on a row is the same sum for every row of windows, so it is made again when the row is handed out.
    `row`: where the first window added begins; rows that windows before it touch as well are then not whole.
    """

    def __init__(
        self,
        classes: int,
        shape: Sequence[int],
        windowing: Windowing,
        dtype: torch.dtype = torch.float32,
        row: int = 0,
    ) -> None:
        self.shape, self.depth = tuple(shape), windowing.size[0]
        self.weight = windowing.weight(dtype)
        self.first, *across = windowing.starts(shape)
        self.places = [Window(start=start, size=windowing.size[1:]).slices for start in product(*across)]
        self.sums = torch.zeros(classes, self.depth, *self.shape[1:], dtype=dtype)
        self.row = row

    def add(self, window: Window, scores: Tensor | None) -> Iterator[tuple[Window, Tensor]]:
        """Adds the scores (K, *window.size) of one window (None: all 0); yields what became final before it."""
        if window.start[0] > self.row:
            yield from self._hand_out(window.start[0])
        if scores is not None:
            place = (slice(None), slice(None), *window.slices[1:])
            self.sums[place].addcmul_(scores.to(self.sums.dtype), self.weight)

    def finish(self) -> Iterator[tuple[Window, Tensor]]:
        """Yields the last slab."""
        yield from self._hand_out(self.shape[0])

    def _hand_out(self, stop: int) -> Iterator[tuple[Window, Tensor]]:
        """Scores float32 of the rows before `stop`, then the other rows move down plane by plane: no second buffer."""
        rows = stop - self.row
        step = max(1, PIECE_BYTES // max(1, self.sums[:, 0].numel() * self.sums.element_size()))
        for at in range(0, rows, step):
            part = slice(at, min(at + step, rows))
            total = torch.stack([self._total(self.row + i) for i in range(part.start, part.stop)])
            window = Window(start=(self.row + at, *(0 for _ in self.shape[1:])), size=tuple(total.shape))
            yield window, (self.sums[:, part] / total).float()
        for i in range(self.depth - rows):
            self.sums[:, i] = self.sums[:, i + rows]
        self.sums[:, self.depth - rows :] = 0
        self.row = stop

    def _total(self, row: int) -> Tensor:
        """The weight that fell on the cells of one finished row, added up in the order of the windows."""
        total = torch.zeros(self.shape[1:], dtype=self.sums.dtype)
        for start in self.first:
            if start <= row < start + self.depth:
                for place in self.places:
                    total[place] += self.weight[row - start]
        return total
