"""Class rasters to polygons, slab by slab; the polygons are the same whatever the slab.

A polygon is a 4-connected set of cells of one code, named by its first cell, so its id is no matter of order. Pieces
meet in whole cell corners, are joined there, and corners on a straight line are dropped before the affine is applied.
Areas are integer counts of `CellArea`, so polygons add up to the cells exactly. Holds all polygons, never the raster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import shapely
from affine import Affine
from rasterio.features import shapes
from skimage.measure import label

from geo.crs import CellArea, transform_of
from geo.formats.geotiff import NODATA, UNOBSERVABLE
from medmamba.errors import GeometryError
from medmamba.source import Source
from medmamba.windows import Window

SLAB_CELLS = 4_000_000  # at a time; float64 counts the areas of so many cells exactly


@dataclass(slots=True)
class Patch:
    """A set of cells while it grows: its first cell, sums over its cells, its pieces in cell corners (col, row)."""

    code: int
    first: int
    cells: int = 0
    counts: int = 0
    confidence: int = 0
    confident_cells: int = 0
    least: int = NODATA
    edge: bool = False
    pieces: list[shapely.Geometry] = field(default_factory=list)
    within: Patch | None = None  # the patch that took this one in

    def root(self) -> Patch:
        """The patch that this one is part of by now."""
        patch = self
        while patch.within is not None:
            patch = patch.within
        return patch

    def join(self, other: Patch) -> None:
        """Takes in another patch of the same code."""
        other.within = self
        self.first, self.least = min(self.first, other.first), min(self.least, other.least)
        self.cells, self.counts = self.cells + other.cells, self.counts + other.counts
        self.confidence += other.confidence
        self.confident_cells += other.confident_cells
        self.edge |= other.edge
        self.pieces += other.pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePolygon:
    """`id` = index of its first cell; `counts` of CellArea; confidence 0..1 or NaN; `edge`: it touches the frame of the
    scene or a cell that could not be observed, so it may go on. `geometry` in the coordinates of the grid's frame."""

    id: int
    code: int
    cells: int
    counts: int
    confidence_mean: float
    confidence_min: float
    edge: bool
    geometry: shapely.Polygon


@dataclass(frozen=True, kw_only=True)
class Polygons:
    """Polygons in order of id, and by code the counts of those below the minimum mapping unit (`dropped`)."""

    kept: tuple[ChangePolygon, ...]
    dropped: Mapping[int, int]
    area: CellArea
    least_area: float


def polygons(
    codes: Source,
    area: CellArea,
    wanted: frozenset[int],
    *,
    confidence: Source | None = None,
    least_area: float = 0.0,
    slab_rows: int | None = None,
) -> Polygons:
    """Polygons of the `wanted` codes of an integer source (1, rows, cols).

    `confidence` (same grid) is percent, uint8, 255 unknown. `least_area` is the minimum mapping unit in m2 (cells
    without a CRS). Raises GeometryError when the grids differ.
    """
    for other in (area.grid, *([confidence.grid] if confidence else [])):
        if not codes.grid.matches(other):
            raise GeometryError(f"codes on {codes.grid.shape} and areas or confidence on {other.shape} do not match")
    kept: list[Patch] = []
    dropped: dict[int, int] = {}
    for patch in patches(codes, area, wanted, confidence, slab_rows):
        if patch.counts * area.quantum < least_area:
            dropped[patch.code] = dropped.get(patch.code, 0) + patch.counts
        else:
            kept.append(patch)
    kept.sort(key=lambda patch: patch.first)
    outlines = placed(outlined([patch.pieces for patch in kept]), transform_of(codes.grid))
    found = tuple(finished(patch, outline) for patch, outline in zip(kept, outlines, strict=True))
    return Polygons(kept=found, dropped=dropped, area=area, least_area=least_area)


def patches(
    codes: Source, area: CellArea, wanted: frozenset[int], confidence: Source | None, slab_rows: int | None
) -> Iterator[Patch]:
    """Whole patches, each when no later slab can touch it."""
    rows, cols = codes.grid.shape
    depth = slab_rows or max(1, SLAB_CELLS // cols)
    open_patches: dict[int, Patch] = {}  # by label in the last row seen
    last_labels = last_codes = np.zeros(cols, dtype=np.int64)
    for top in range(0, rows, depth):
        window = Window(start=(top, 0), size=(min(depth, rows - top), cols))
        labels, values, new = slab_patches(codes, area, wanted, confidence, window)
        links = (last_labels > 0) & (labels[0] > 0) & (last_codes == values[0])
        pairs = np.unique(np.stack([last_labels[links], labels[0][links]], axis=1), axis=0)
        for old, fresh in pairs.tolist():
            one, other = open_patches[old].root(), new[fresh - 1].root()
            if one is not other:
                one.join(other)
        still = {int(n): new[n - 1].root() for n in np.unique(labels[-1]) if n}
        alive = {id(p) for p in still.values()}
        yield from {id(p): p for p in map(Patch.root, (*open_patches.values(), *new)) if id(p) not in alive}.values()
        open_patches, last_labels, last_codes = still, labels[-1], values[-1]
    yield from {id(p): p for p in open_patches.values()}.values()


def slab_patches(
    codes: Source, area: CellArea, wanted: frozenset[int], confidence: Source | None, window: Window
) -> tuple[np.ndarray, np.ndarray, list[Patch]]:
    """Labels (rows, cols; 0 none), codes and the patches of one slab, patch n - 1 for label n."""
    values, edge = codes_and_edges(codes, window)
    values = np.where(np.isin(values, list(wanted)), values, -1)
    labels = label(values, background=-1, connectivity=1).astype(np.int32)
    number = int(labels.max())
    if number == 0:
        return labels, values, []
    where = np.flatnonzero(labels)
    found = labels.ravel()[where]
    first = np.zeros(number + 1, dtype=np.int64)
    first[found[::-1]] = where[::-1]  # the last written is the smallest index
    cells = np.bincount(found, minlength=number + 1)
    counts = np.bincount(found, weights=area.counts(window).ravel()[where], minlength=number + 1).astype(np.int64)
    touching = np.bincount(found, weights=edge.ravel()[where], minlength=number + 1) > 0
    sums = known = np.zeros(number + 1, dtype=np.int64)
    least = np.full(number + 1, NODATA, dtype=np.int64)
    if confidence is not None:
        percent = confidence_percent(confidence, window).ravel()[where]
        sure = percent != NODATA
        known = np.bincount(found[sure], minlength=number + 1)
        sums = np.bincount(found[sure], weights=percent[sure], minlength=number + 1).astype(np.int64)
        np.minimum.at(least, found, percent.astype(np.int64))
    offset = window.start[0] * window.size[1]
    result = [
        Patch(
            code=int(values.ravel()[first[n]]),
            first=int(first[n]) + offset,
            cells=int(cells[n]),
            counts=int(counts[n]),
            confidence=int(sums[n]),
            confident_cells=int(known[n]),
            least=int(least[n]),
            edge=bool(touching[n]),
        )
        for n in range(1, number + 1)
    ]
    corner = Affine.translation(0, window.start[0])
    for geometry, n in shapes(labels, mask=labels > 0, connectivity=4, transform=corner):
        result[int(n) - 1].pieces.append(shapely.geometry.shape(geometry))
    return labels, values, result


def codes_and_edges(codes: Source, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, cols) int64 and the cells beside the scene's frame or beside a cell that was not observed."""
    rows, cols = codes.grid.shape
    above, below = int(window.start[0] > 0), int(window.stop[0] < rows)
    around = Window(start=(window.start[0] - above, 0), size=(window.size[0] + above + below, cols))
    image = codes.read(around)
    values = image.array[0].astype(np.int64)
    hidden = values == UNOBSERVABLE
    if image.valid is not None:
        hidden |= ~image.valid
    values = np.where(hidden, -1, values)
    framed = np.pad(hidden, ((1 - above, 1 - below), (1, 1)), constant_values=True)
    middle = slice(1, 1 + window.size[0])
    edge = framed[:-2, 1:-1][: window.size[0]] | framed[2:, 1:-1] | framed[middle, :-2] | framed[middle, 2:]
    return values[above : above + window.size[0]], edge


def confidence_percent(confidence: Source, window: Window) -> np.ndarray:
    """Percent (rows, cols) uint8, 255 unknown; from stored percent or from a raster scaled to 0..1."""
    image = confidence.read(window)
    percent = image.array[0]
    if percent.dtype.kind == "f":
        percent = np.rint(np.nan_to_num(percent) * 100)
    percent = percent.astype(np.uint8)
    return percent if image.valid is None else np.where(image.valid, percent, np.uint8(NODATA))


def finished(patch: Patch, outline: shapely.Polygon) -> ChangePolygon:
    """The polygon of a whole patch."""
    known = patch.confident_cells
    return ChangePolygon(
        id=patch.first,
        code=patch.code,
        cells=patch.cells,
        counts=patch.counts,
        confidence_mean=patch.confidence / known / 100 if known else float("nan"),
        confidence_min=patch.least / 100 if known else float("nan"),
        edge=patch.edge,
        geometry=outline,
    )


def outlined(groups: list[list[shapely.Geometry]]) -> np.ndarray:
    """Each group of pieces in whole corners as one valid polygon, no corner on a straight line, in canonical order."""
    if not groups:
        return np.array([], dtype=object)
    whole = np.empty(len(groups), dtype=object)
    single = np.array([len(pieces) == 1 for pieces in groups])
    lone = np.array([pieces[0] for pieces in groups if len(pieces) == 1], dtype=object)
    whole[single] = shapely.union_all(lone[:, None], axis=1)  # a ring that touches itself becomes valid here
    whole[~single] = [shapely.union_all(pieces) for pieces in groups if len(pieces) > 1]
    kind, points, (rings, parts) = shapely.to_ragged_array(whole)
    points, rings = corners(points, rings)
    return shapely.normalize(shapely.from_ragged_array(kind, points, (rings, parts)))


def corners(points: np.ndarray, rings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closed rings of axis-parallel steps, ragged (points (N, 2), offsets), less the points where they go straight."""
    first, last = rings[:-1], rings[1:] - 1
    before, after = np.arange(-1, len(points) - 1), np.arange(1, len(points) + 1)
    before[first], after[last - 1] = last - 1, first
    after[last] = first  # the closing point is not looked at
    come, go = points - points[before], points[after] - points
    turn = come[:, 0] * go[:, 1] != come[:, 1] * go[:, 0]
    turn[last] = False
    kept = np.add.reduceat(turn, first)
    offsets = np.concatenate([[0], np.cumsum(kept + 1)])
    result = np.empty((offsets[-1], 2))
    closing = offsets[1:] - 1
    inside = np.ones(len(result), dtype=bool)
    inside[closing] = False
    result[inside] = points[turn]
    result[closing] = result[offsets[:-1]]
    return result, offsets


def placed(outlines: np.ndarray, transform: Affine) -> np.ndarray:
    """Polygons in cell corners (col, row) in world coordinates."""
    a, b, c, d, e, f = tuple(transform)[:6]

    def move(points: np.ndarray) -> np.ndarray:
        col, row = points.T
        return np.stack([a * col + b * row + c, d * col + e * row + f], axis=1)

    return shapely.transform(outlines, move)
