"""An array on another grid of the same box: separable linear interpolation, lazily by window, or slab by slab.

Both grids share their axes and edges (`Grid.zoom`); cell centre i of n cells onto m lies at (i + 1/2) m/n - 1/2, as in
torch's `interpolate(align_corners=False)`. Truth for tests: `interpolate` on the whole array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from medmamba.errors import GeometryError
from medmamba.grid import Grid
from medmamba.sample import Image
from medmamba.source import Sink, Source
from medmamba.windows import PIECE_BYTES, Window


def taps(n_out: int, n_in: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index (clamped) and weight of the upper one, for output cells start..start+size."""
    position = (np.arange(start, start + size) + 0.5) * (n_in / n_out) - 0.5
    position = np.clip(position, 0.0, n_in - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, n_in - 1)
    return low, high, (position - low).astype(np.float32)


def interpolate_axis(array: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis, float32."""
    shape = [1] * array.ndim
    shape[axis] = len(weight)
    w = weight.reshape(shape)
    if axis == array.ndim - 1:  # single cells: numpy's index is the fastest; whole runs of cells: take is
        lower, upper = (array[..., index] for index in (low, high))
    else:
        lower, upper = (np.take(array, index, axis=axis) for index in (low, high))
    return torch.lerp(*(torch.from_numpy(x) for x in (lower, upper, w))).numpy()


class ResampledSource:
    """A source seen on `shape` cells over the same box: linear interpolation, valid by nearest cell; window = whole.

    `order` 0 takes the nearest cell (labels), 1 interpolates linearly.
    """

    def __init__(self, source: Source, shape: Sequence[int], *, order: int = 1) -> None:
        if order not in (0, 1):
            raise GeometryError(f"resampling order {order} unknown; known: 0 (nearest), 1 (linear)")
        self.source, self.order = source, order
        self.grid: Grid = source.grid.zoom(shape)
        self.channels = source.channels
        self.dtype = source.dtype if order == 0 else np.dtype("float32")

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        shape_in = self.source.grid.shape
        axes = [
            taps(m, n, s, w) for m, n, s, w in zip(self.grid.shape, shape_in, window.start, window.size, strict=True)
        ]
        start = tuple(int(low.min()) for low, _, _ in axes)
        size = tuple(int(high.max()) - s + 1 for (_, high, _), s in zip(axes, start, strict=True))
        inner = self.source.read(Window(start=start, size=size))
        cells = [np.where(w < 0.5, low, high) - s for (low, high, w), s in zip(axes, start, strict=True)]
        nearest: tuple[Any, ...] = np.ix_(*cells)
        if self.order == 0:
            array = inner.array[(slice(None), *nearest)]
        else:
            array = inner.array.astype(np.float32)
            for axis, ((low, high, weight), s) in enumerate(zip(axes, start, strict=True)):
                if self.grid.shape[axis] != shape_in[axis]:
                    array = interpolate_axis(array, axis + 1, low - s, high - s, weight)
                else:
                    array = np.take(array, low - s, axis=axis + 1)
        valid = None if inner.valid is None else inner.valid[nearest]
        return Image(array, self.grid.crop(window.start, window.size), self.channels, valid)


class ResampledSink:
    """Takes score slabs in order of axis 0 on one grid, hands them on over `inner`'s grid as soon as they are final.

    `shape_in` is the grid written to, `shape_out` that of the inner sink. Holds one carried plane of the input grid;
    a plane goes out in pieces of PIECE_BYTES, so that all classes never stand on the output grid at once.
    """

    def __init__(self, sink: Sink, shape_in: Sequence[int], shape_out: Sequence[int]) -> None:
        self.sink, self.shape_in, self.shape_out = sink, tuple(shape_in), tuple(shape_out)
        self.low, self.high, self.weight = taps(self.shape_out[0], self.shape_in[0], 0, self.shape_out[0])
        self.planes: dict[int, np.ndarray] = {}
        self.next_in = self.next_out = 0

    def write(self, window: Window, array: np.ndarray) -> None:
        if window.start[0] != self.next_in or window.size[1:] != self.shape_in[1:]:
            raise GeometryError(f"slab {window} came out of order; expected whole planes from row {self.next_in}")
        for offset in range(window.size[0]):
            self.planes[self.next_in] = array[:, offset]
            self.next_in += 1
            self._hand_on()

    def _hand_on(self) -> None:
        while self.next_out < self.shape_out[0] and self.high[self.next_out] < self.next_in:
            lower, upper = self.planes[int(self.low[self.next_out])], self.planes[int(self.high[self.next_out])]
            for piece in self._pieces(len(lower)):
                window = Window(start=(self.next_out, *piece.start), size=(1, *piece.size))
                self.sink.write(window, self._on(piece, lower, upper)[:, None])
            self.next_out += 1
        keep = int(self.low[self.next_out]) if self.next_out < self.shape_out[0] else self.next_in
        for row in [r for r in self.planes if r < keep]:
            del self.planes[row]

    def _pieces(self, classes: int) -> Iterator[Window]:
        """Windows of one output plane, whole but for its first axis."""
        if len(self.shape_out) == 1:
            yield Window(start=(), size=())
            return
        n, *rest = self.shape_out[1:]
        step = max(1, PIECE_BYTES // (4 * classes * int(np.prod(rest, initial=1))))
        for at in range(0, n, step):
            yield Window(start=(at, *(0 for _ in rest)), size=(min(step, n - at), *rest))

    def _on(self, piece: Window, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """A piece of the present output plane; the last axis first, while there are few rows."""
        axes = [taps(m, n, s, w) for m, n, s, w in zip(self.shape_out[1:], self.shape_in[1:], piece.start, piece.size)]
        cut = (slice(None), *(slice(int(low[0]), int(high[-1]) + 1) for low, high, _ in axes))
        part = lower[cut] + (upper[cut] - lower[cut]) * self.weight[self.next_out]
        for axis in range(len(axes), 0, -1):
            low, high, weight = axes[axis - 1]
            if self.shape_out[axis] != self.shape_in[axis]:
                part = interpolate_axis(part, axis, low - low[0], high - low[0], weight)
        return part

    def close(self) -> None:
        self.sink.close()
