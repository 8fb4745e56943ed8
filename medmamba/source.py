"""Where arrays come from and go to: the two protocols, in-memory forms, and sources that wear other sources.

Everything between the file and the network is a Source wearing another Source; everything after it is a Sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medmamba.errors import GeometryError, InputError
from medmamba.grid import Grid
from medmamba.sample import Image
from medmamba.windows import Window

ROWS_CELLS = 1_000_000  # read at a time by RowCache


class Source(Protocol):
    """Knows its `grid` at once and reads arrays by window. `read` refuses a window that leaves the grid."""

    @property
    def grid(self) -> Grid: ...
    @property
    def channels(self) -> tuple[str, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, window: Window) -> Image: ...


class FileSource(Source, Protocol):
    """A source that stands on a file (or folder) `path`. `notes`: what the reader of the result must know, such as a
    tilt that was kept or an orientation that was assumed; they go into the report. `close` lets maps and scratch go."""

    @property
    def path(self) -> Path: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def close(self) -> None: ...


class Sink(Protocol):
    """Takes arrays (C, *window.size) in any order of windows; `close` makes them last."""

    def write(self, window: Window, array: np.ndarray) -> None: ...
    def close(self) -> None: ...


def read_all(source: Source) -> Image:
    """The whole image in memory."""
    return source.read(Window.whole(source.grid.shape))


def whole_labels(source: FileSource) -> np.ndarray:
    """A label image (*space) int32. Raises InputError when it has several channels or values that are not whole."""
    if len(source.channels) != 1:
        raise InputError("wrong_channels", f"{source.path}: {len(source.channels)} channels; a label image has 1")
    image = read_all(source).array[0]
    whole = np.rint(image)
    if not np.array_equal(whole, image):
        found = image[whole != image][0]
        raise InputError("bad_header", f"{source.path}: label values such as {found} are not whole numbers")
    return whole.astype(np.int32)


class ArraySource:
    """An image in memory."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.grid = image.grid
        self.channels = image.channels
        self.dtype = image.array.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        valid = None if self.image.valid is None else self.image.valid[window.slices]
        grid = self.grid.crop(window.start, window.size)
        return Image(self.image.array[(slice(None), *window.slices)], grid, self.channels, valid)


class ArraySink:
    """An array (C, *space) in memory, filled by window."""

    def __init__(self, channels: int, shape: Sequence[int], dtype: str | np.dtype = "float32") -> None:
        self.array = np.zeros((channels, *shape), dtype=dtype)

    def write(self, window: Window, array: np.ndarray) -> None:
        self.array[(slice(None), *window.slices)] = array

    def close(self) -> None:
        """Nothing to do: the array is the result."""


class StackedSource:
    """Several sources on one grid as one: channels one after another, valid where all are.

    Raises GeometryError when the grids do not match.
    """

    def __init__(self, *sources: Source) -> None:
        for other in sources[1:]:
            if not sources[0].grid.matches(other.grid):
                raise GeometryError(
                    f"grids differ: shape {sources[0].grid.shape} affine {sources[0].grid.affine.tolist()} against "
                    f"shape {other.grid.shape} affine {other.grid.affine.tolist()}; resample one onto the other first"
                )
        self.sources = sources
        self.grid = sources[0].grid
        self.channels = tuple(name for s in sources for name in s.channels)
        self.dtype = np.result_type(*(s.dtype for s in sources))

    def read(self, window: Window) -> Image:
        images = [s.read(window) for s in self.sources]
        masks = [i.valid for i in images if i.valid is not None]
        valid = np.logical_and.reduce(masks) if masks else None
        return Image(np.concatenate([i.array for i in images]), images[0].grid, self.channels, valid)


class ZeroSource:
    """One channel that is 0 everywhere."""

    def __init__(self, grid: Grid, channel: str) -> None:
        self.grid, self.channels, self.dtype = grid, (channel,), np.dtype("float32")

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        return Image(np.zeros((1, *window.size), np.float32), self.grid.crop(window.start, window.size), self.channels)


class SelectedSource:
    """One channel of a source."""

    def __init__(self, source: Source, channel: int) -> None:
        self.source, self.channel = source, channel
        self.grid, self.dtype = source.grid, source.dtype
        self.channels = (source.channels[channel],)

    def read(self, window: Window) -> Image:
        image = self.source.read(window)
        array = image.array[self.channel : self.channel + 1]
        return Image(array, image.grid, self.channels, image.valid)


class WindowSource:
    """What a window of a source shows, as an image of its own."""

    def __init__(self, source: Source, window: Window) -> None:
        self.source, self.start = source, window.start
        self.grid = source.grid.crop(window.start, window.size)
        self.channels, self.dtype = source.channels, source.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        return self.source.read(window.moved(self.start))


def turned(array: np.ndarray, order: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """A view of the array as `Grid.permute` turns its grid."""
    view: np.ndarray = array.transpose(order)[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
    return view


class PermutedSource:
    """A source seen with its array axes in another order and some reversed; no copy of the whole."""

    def __init__(self, source: Source, order: Sequence[int], flips: Sequence[bool]) -> None:
        self.source, self.order, self.flips = source, tuple(order), tuple(flips)
        self.grid = source.grid.permute(order, flips)
        self.channels, self.dtype = source.channels, source.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        image = self.source.read(permuted_window(window, self.grid.shape, self.order, self.flips))
        array = turned(image.array, (0, *[a + 1 for a in self.order]), (False, *self.flips))
        valid = None if image.valid is None else turned(image.valid, self.order, self.flips)
        return Image(array, self.grid.crop(window.start, window.size), self.channels, valid)


class PermutedSink:
    """A sink that takes windows of the permuted view and hands them on in the inner sink's own axis order."""

    def __init__(self, sink: Sink, shape: Sequence[int], order: Sequence[int], flips: Sequence[bool]) -> None:
        self.sink, self.shape, self.order, self.flips = sink, tuple(shape), tuple(order), tuple(flips)

    def write(self, window: Window, array: np.ndarray) -> None:
        reverse = tuple(slice(None, None, -1) if f else slice(None) for f in self.flips)
        back = [0] * len(self.order)
        for new, old in enumerate(self.order):
            back[old] = new + 1
        inner = permuted_window(window, self.shape, self.order, self.flips)
        self.sink.write(inner, array[(slice(None), *reverse)].transpose(0, *back))

    def close(self) -> None:
        self.sink.close()


def permuted_window(window: Window, shape: Sequence[int], order: Sequence[int], flips: Sequence[bool]) -> Window:
    """The window of the inner array that a window of the permuted view (of `shape`) covers."""
    start, size = [0] * len(order), [0] * len(order)
    for new, old in enumerate(order):
        begin = window.start[new]
        start[old] = shape[new] - begin - window.size[new] if flips[new] else begin
        size[old] = window.size[new]
    return Window(start=tuple(start), size=tuple(size))


class PaddedSource:
    """A source with cells added around it, by numpy's `mode` ("edge", "constant" = 0); added cells are not valid."""

    def __init__(self, source: Source, before: Sequence[int], after: Sequence[int], mode: str = "edge") -> None:
        self.source, self.before, self.mode = source, tuple(before), mode
        self.grid = source.grid.pad(before, after)
        self.channels, self.dtype = source.channels, source.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        shape = self.source.grid.shape
        start = [s - b for s, b in zip(window.start, self.before, strict=True)]
        low = [min(max(s, 0), n - 1) for s, n in zip(start, shape, strict=True)]
        stop = [min(max(s + w, 1), n) for s, w, n in zip(start, window.size, shape, strict=True)]
        stop = [max(e, b + 1) for e, b in zip(stop, low, strict=True)]
        inner = self.source.read(Window(start=tuple(low), size=tuple(e - b for e, b in zip(stop, low, strict=True))))
        where = [np.arange(s, s + w) for s, w in zip(start, window.size, strict=True)]
        index: tuple[Any, ...] = np.ix_(*[np.clip(i, b, e - 1) - b for i, b, e in zip(where, low, stop, strict=True)])
        valid = np.ones(window.size, dtype=bool)
        for axis, (i, n) in enumerate(zip(where, shape, strict=True)):
            valid &= ((i >= 0) & (i < n)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        array = inner.array[(slice(None), *index)]
        if self.mode == "constant":
            array = np.where(valid, array, array.dtype.type(0))
        elif self.mode != "edge":
            raise GeometryError(f"padding mode {self.mode!r} is unknown; known: edge, constant")
        if inner.valid is not None:
            valid = valid & inner.valid[index]
        return Image(array, self.grid.crop(window.start, window.size), self.channels, valid)


class RowCache:
    """A source that keeps the last `depth` rows (axis 0, whole planes) of another, so that overlapping windows read in
    order touch each row once. Arrays are views, good until the next read; a window that goes back starts afresh."""

    def __init__(self, source: Source, depth: int) -> None:
        self.source, self.depth = source, depth
        self.grid, self.channels, self.dtype = source.grid, source.channels, source.dtype
        self.first = self.stop = 0
        self._array = np.empty(0)
        self._valid: np.ndarray | None = None

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        self._hold(window.start[0], window.stop[0])
        rows = (slice(window.start[0] - self.first, window.stop[0] - self.first), *window.slices[1:])
        valid = None if self._valid is None else self._valid[rows]
        return Image(self._array[(slice(None), *rows)], self.grid.crop(window.start, window.size), self.channels, valid)

    def _hold(self, start: int, stop: int) -> None:
        """Makes rows start..stop present; those still wanted move to the front."""
        if not self.first <= start <= self.stop or stop - start > self.depth or not self._array.size:
            self.first = self.stop = start
            self.depth = max(self.depth, stop - start)
            self._array = np.empty((len(self.channels), self.depth, *self.grid.shape[1:]), self.dtype)
            self._valid = None
        if stop > self.stop:
            self._drop(start - self.first)
        plane = max(1, int(np.prod(self.grid.shape[1:])))
        while self.stop < stop:
            rows = min(stop - self.stop, max(1, ROWS_CELLS // plane))
            origin = (self.stop, *(0 for _ in self.grid.shape[1:]))
            self._take(self.source.read(Window(start=origin, size=(rows, *self.grid.shape[1:]))))

    def _drop(self, rows: int) -> None:
        kept = self.stop - self.first - rows
        for i in range(kept if rows else 0):
            self._array[:, i] = self._array[:, i + rows]
            if self._valid is not None:
                self._valid[i] = self._valid[i + rows]
        self.first += rows

    def _take(self, image: Image) -> None:
        at = slice(self.stop - self.first, self.stop - self.first + image.grid.shape[0])
        self._array[:, at] = image.array
        if image.valid is not None and self._valid is None:
            self._valid = np.ones(self._array.shape[1:], dtype=bool)
        if self._valid is not None:
            self._valid[at] = True if image.valid is None else image.valid
        self.stop += image.grid.shape[0]
