"""What became what: two class rasters as from-to codes, and the transition matrix in hectares.

Counts are integers of `CellArea`: row and column sums equal the areas of the classes exactly, in any order of slabs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo.crs import CellArea
from geo.formats.geotiff import UNOBSERVABLE
from medmamba.errors import GeometryError
from medmamba.files import write_bytes, write_json
from medmamba.preprocessing import slabs
from medmamba.sample import Image
from medmamba.source import Source
from medmamba.windows import Window

RADIX = 256  # from-to code = from * 256 + to


def from_to(code: int) -> tuple[int, int]:
    """The two classes of a from-to code."""
    return divmod(code, RADIX)


class FromToSource:
    """Two class rasters (uint8, one grid) as one of from-to codes (uint16); 0 where nothing changed.

    Not valid where a date is not valid or not observable (254). Classes start from 1; 0 is a class too, but the change
    from 0 to 0 is none.
    """

    def __init__(self, before: Source, after: Source) -> None:
        if not before.grid.matches(after.grid):
            raise GeometryError(f"class rasters of {before.grid.shape} and {after.grid.shape} do not lie on one grid")
        self.before, self.after, self.grid = before, after, before.grid
        self.channels, self.dtype = ("from-to",), np.dtype("uint16")

    def read(self, window: Window) -> Image:
        first, second, valid = both(self.before, self.after, window)
        code = np.where(valid & (first != second), first * RADIX + second, 0)
        return Image(code[None].astype(np.uint16), self.grid.crop(window.start, window.size), self.channels, valid)


def both(before: Source, after: Source, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of two dates (rows, cols) int64 and where both were observed."""
    images = [before.read(window), after.read(window)]
    classes = [i.array[0].astype(np.int64) for i in images]
    valid = (classes[0] != UNOBSERVABLE) & (classes[1] != UNOBSERVABLE)
    for image in images:
        if image.valid is not None:
            valid &= image.valid
    return classes[0], classes[1], valid


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """`counts[i, j]` of CellArea that were class `classes[i]` and became `classes[j]`; `unobserved` counts beside."""

    classes: tuple[int, ...]
    names: tuple[str, ...]
    counts: np.ndarray
    unobserved: int
    area: CellArea

    @property
    def unit(self) -> str:
        return "ha" if self.area.unit == "m2" else "cells"

    @property
    def hectares(self) -> np.ndarray:
        """The matrix in hectares (cells without a CRS)."""
        return np.array([[self.area.hectares(int(c)) for c in row] for row in self.counts]).reshape(self.counts.shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "classes": list(self.classes),
            "names": list(self.names),
            "from_to": self.hectares.tolist(),
            "from_total": [self.area.hectares(int(c)) for c in self.counts.sum(axis=1)],
            "to_total": [self.area.hectares(int(c)) for c in self.counts.sum(axis=0)],
            "changed": self.area.hectares(int(self.counts.sum() - np.trace(self.counts))),
            "not_observed": self.area.hectares(self.unobserved),
        }

    def save(self, stem: Path) -> tuple[Path, Path]:
        """`<stem>.csv` (rows = from, columns = to, sums at the ends) and `<stem>.json`, atomically."""
        told = self.to_json()
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([f"from \\ to ({self.unit})", *self.names, "total"])
        for name, row, total in zip(self.names, told["from_to"], told["from_total"], strict=True):
            table.writerow([name, *row, total])
        table.writerow(["total", *told["to_total"], self.area.hectares(int(self.counts.sum()))])
        table.writerow(["not observed", told["not_observed"]])
        files = stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.json")
        write_bytes(files[0], text.getvalue().encode())
        write_json(files[1], told)
        return files


def transitions(before: Source, after: Source, area: CellArea, names: Mapping[int, str]) -> Transitions:
    """The matrix over `names` (class -> name) of two class rasters on the grid of `area`.

    Raises GeometryError on other grids or a class without a name.
    """
    if not (before.grid.matches(area.grid) and after.grid.matches(area.grid)):
        raise GeometryError(f"class rasters of {before.grid.shape} and {after.grid.shape}, areas of {area.grid.shape}")
    classes = tuple(sorted(names))
    at = np.full(RADIX, -1)
    at[list(classes)] = np.arange(len(classes))
    size = len(classes)
    counts, unobserved = np.zeros(size * size, dtype=np.int64), 0
    for window in slabs(area.grid.shape):
        first, second, valid = both(before, after, window)
        cells = area.counts(window)
        row, col = at[first[valid]], at[second[valid]]
        if min(row.min(initial=0), col.min(initial=0)) < 0:
            strange = sorted({*np.unique(first[valid]), *np.unique(second[valid])} - set(classes))
            raise GeometryError(f"classes {[int(c) for c in strange]} have no name; known: {dict(names)}")
        counts += np.bincount(row * size + col, weights=cells[valid], minlength=size * size).astype(np.int64)
        unobserved += int(cells[~valid].sum())
    return Transitions(
        classes=classes,
        names=tuple(names[c] for c in classes),
        counts=counts.reshape(size, size),
        unobserved=unobserved,
        area=area,
    )


def class_areas(codes: Source, area: CellArea, names: Mapping[int, str]) -> dict[str, float]:
    """Hectares (cells without a CRS) of each named code of a class raster, and "not observed"."""
    counts, hidden = np.zeros(RADIX, dtype=np.int64), 0
    for window in slabs(area.grid.shape):
        values, _, valid = both(codes, codes, window)
        cells = area.counts(window)
        counts += np.bincount(values[valid], weights=cells[valid], minlength=RADIX).astype(np.int64)
        hidden += int(cells[~valid].sum())
    found = {name: area.hectares(int(counts[code])) for code, name in sorted(names.items())}
    return {**found, "not observed": area.hectares(hidden)}
