"""Dates of one place on one grid: which grid, what ground they share, what was done to each.

Pairs that cannot be compared (other bands, other units, no common ground) are refused with a reason code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geo.raster import RasterSource
from geo.scene import BandsSource, Scene
from geo.warp import AlignedSource, CroppedSource, cell_side, index_of
from medmamba.errors import ConfigError, InputError
from medmamba.grid import PIXELS, Grid

REFERENCES = ("first", "last", "finest", "coarsest")  # whose grid all dates are brought onto


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Dates on one `grid`; `record` is what was chosen, for the report."""

    sources: tuple[Scene, ...]
    grid: Grid
    record: dict[str, Any]


def align(sources: Sequence[Scene], *, reference: str = "first", resampling: str = "bilinear") -> Alignment:
    """All dates on the grid of one (`reference`: one of REFERENCES), cut to the ground that all show.

    Raises InputError: wrong_channels, wrong_units (dates differ), grid_mismatch (without georeference and of another
    shape), no_overlap.
    """
    if reference not in REFERENCES:
        raise ConfigError(f"reference {reference!r} unknown; known: {', '.join(REFERENCES)}")
    require_alike(sources)
    grids = [s.grid for s in sources]
    sizes = [cell_side(g) for g in grids]
    at = {"first": 0, "last": len(grids) - 1, "finest": int(np.argmin(sizes)), "coarsest": int(np.argmax(sizes))}
    chosen = grids[at[reference]]
    start, stop = [0, 0], list(chosen.shape)
    for other in grids:
        low, high = overlap(chosen, other)
        start, stop = [*map(max, start, low)], [*map(min, stop, high)]
    if any(e <= s for s, e in zip(start, stop)):
        raise InputError("no_overlap", f"the dates show no common ground: {[g.corners().tolist() for g in grids]}")
    grid = chosen.crop(start, [e - s for s, e in zip(start, stop)])
    seen = tuple(seen_on(s, grid, resampling=resampling) for s in sources)
    record = {"reference": reference, "shape": list(grid.shape), "affine": grid.affine.tolist(), "frame": grid.frame}
    return Alignment(sources=seen, grid=grid, record={**record, "warps": [options_of(s) for s in seen]})


def seen_on(
    source: Scene, grid: Grid, *, resampling: str = "bilinear", shift_px: tuple[float, float] = (0.0, 0.0)
) -> Scene:
    """`source` on `grid`; its own cells untouched where the lattices agree, else resampled once, whatever it wore."""
    if isinstance(source, BandsSource):
        parts = [seen_on(p, grid, resampling=resampling, shift_px=shift_px) for p in source.parts]
        return BandsSource(source.path, parts, units=source.units, notes=source.notes)
    inner = source.source if isinstance(source, AlignedSource | CroppedSource) else source
    if not isinstance(inner, RasterSource):
        raise ConfigError(f"{type(source).__name__} cannot be aligned: align the raster first, then dress it")
    if grid.frame == inner.grid.frame and shift_px == (0.0, 0.0):
        start = np.linalg.solve(inner.grid.affine, grid.affine[:, -1])[:2]
        whole = [round(float(s)) for s in start]
        inside = all(s >= 0 and s + n <= m for s, n, m in zip(whole, grid.shape, inner.grid.shape, strict=True))
        if inside and inner.grid.crop(whole, grid.shape).matches(grid):
            return inner if inner.grid.matches(grid) else CroppedSource(inner, whole, grid.shape)
    return AlignedSource(inner, grid, resampling=resampling, shift_px=shift_px)


def options_of(source: Scene) -> Any:
    """What `seen_on` did to a source, for the report."""
    if isinstance(source, BandsSource):
        return [options_of(p) for p in source.parts]
    return source.options if isinstance(source, AlignedSource | CroppedSource) else {"resampling": "none"}


def require_alike(sources: Sequence[Scene]) -> None:
    """Raises InputError("wrong_channels") or ("wrong_units") when the dates cannot be compared."""
    counts, units = [len(s.channels) for s in sources], [s.units for s in sources]
    if len(set(counts)) > 1:
        raise InputError(
            "wrong_channels", f"the dates have {counts} bands {[s.channels for s in sources]}; choose alike"
        )
    if len(set(units)) > 1:
        raise InputError("wrong_units", f"the dates are in {units}; bring both to reflectance or to one type first")


def overlap(grid: Grid, other: Grid) -> tuple[list[int], list[int]]:
    """First cell and one behind the last, per axis of `grid`, of the box whose centres `other` may cover."""
    if PIXELS in (grid.frame, other.frame):
        if grid.frame == other.frame and grid.shape == other.shape:
            return [0, 0], list(grid.shape)
        raise InputError(
            "grid_mismatch",
            f"without georeference both dates need one shape; found {grid.shape} in {grid.frame[:40]} and "
            f"{other.shape} in {other.frame[:40]}",
        )
    edge = np.linspace(0, 1, 41)
    side = np.stack([edge, np.zeros_like(edge)])
    ring = np.concatenate([side, side[::-1], 1 - side, 1 - side[::-1]], axis=1)
    index = ring * np.array(other.shape)[:, None] - 0.5
    cells = index_of(grid, other, index)
    cells = cells[:, np.isfinite(cells).all(axis=0)]
    if not cells.size:
        return [0, 0], [0, 0]
    low, high = np.ceil(cells.min(axis=1) - 1e-3), np.floor(cells.max(axis=1) + 1e-3) + 1
    start = [int(np.clip(v, 0, n)) for v, n in zip(low, grid.shape, strict=True)]
    return start, [int(np.clip(v, 0, n)) for v, n in zip(high, grid.shape, strict=True)]
