"""Small pictures of large rasters, read slab by slab: a scene in colour, a class raster in its colours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from geo.radiometry import Stretch, StretchedSource
from medmamba.files import atomic_write
from medmamba.source import Source
from medmamba.windows import Window

BACKGROUND = 32  # grey of cells without data


def blocks(shape: tuple[int, ...], longest: int) -> tuple[int, tuple[int, int]]:
    """Cells a side of one picture point, and the shape of the picture, so that no side exceeds `longest` points."""
    side = max(1, -(-max(shape) // longest))
    return side, (-(-shape[0] // side), -(-shape[1] // side))


def bands_of(source: Source, side: int) -> Iterator[tuple[int, Window]]:
    """Windows of whole rows, `side` deep: one row of the picture each."""
    rows, cols = source.grid.shape
    for at, top in enumerate(range(0, rows, side)):
        yield at, Window(start=(top, 0), size=(min(side, rows - top), cols))


def picture(source: Source, stretch: Stretch, rgb: tuple[int, int, int], *, longest: int = 1024) -> np.ndarray:
    """A scene as (h, w, 4) uint8: mean of the valid cells of a block, three channels by index, alpha 0 where none."""
    side, (height, width) = blocks(source.grid.shape, longest)
    result = np.zeros((height, width, 4), dtype=np.uint8)
    seen = StretchedSource(source, stretch)
    for at, window in bands_of(source, side):
        image = seen.read(window)
        valid = np.ones(window.size, dtype=bool) if image.valid is None else image.valid
        edges = np.arange(0, window.size[1], side)
        number = np.add.reduceat(valid.sum(axis=0), edges)
        sums = np.add.reduceat((image.array[list(rgb)] * valid).sum(axis=1), edges, axis=1)
        mean = sums / np.maximum(number, 1) * 255
        result[at, :, :3] = np.where(number > 0, np.rint(mean), BACKGROUND).T
        result[at, :, 3] = np.where(number > 0, 255, 0)
    return result


def class_picture(codes: Source, colours: Mapping[int, tuple[int, int, int]], *, longest: int = 1024) -> np.ndarray:
    """A class raster as (h, w, 4) uint8: the most frequent coloured class of a block, so that small changes are seen;
    transparent where a block holds none."""
    side, (height, width) = blocks(codes.grid.shape, longest)
    result = np.zeros((height, width, 4), dtype=np.uint8)
    shown = sorted(colours)
    table = np.array([(*colours[c], 255) for c in shown], dtype=np.uint8).reshape(-1, 4)
    for at, window in bands_of(codes, side):
        image = codes.read(window)
        values = image.array[0]
        edges = np.arange(0, window.size[1], side)
        counts = np.stack([np.add.reduceat((values == c).sum(axis=0), edges) for c in shown])
        best = counts.argmax(axis=0)
        result[at] = np.where((counts.max(axis=0) > 0)[:, None], table[best], 0)
    return result


def write_png(path: Path, rgba: np.ndarray) -> None:
    """A picture (h, w, 3 or 4) uint8 as PNG, atomically."""
    with atomic_write(path) as file:
        Picture.fromarray(rgba).save(file, format="PNG", optimize=True)
