"""Frames, corners and areas of the earth: between GDAL's corner transform and the house's cell-centre affine.

A geo `Grid` has array axes (row, col) and world axes (x, y) of its CRS. GDAL's transform maps (col, row) to the CORNER
of a cell; the house's affine maps (row, col) to its CENTRE: turned in `grid_of` and `transform_of`, nowhere else.
Areas are of the ellipsoid: |d(lon, lat) / d(col, row)| times the ellipsoid's own area element, never degrees and never
the projection's plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyproj
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from scipy.interpolate import RectBivariateSpline

from medmamba.errors import InputError
from medmamba.grid import PIXELS, Grid
from medmamba.windows import Window

NODES = 33  # lattice of the areal scale over a scene; a cubic spline between nodes is good to 1e-8 on a whole globe
CELL_BITS = 30  # an area is counted in units of 2^-30 of a cell or finer: sums over any order of slabs are equal
METRES2_PER_HECTARE = 1e4


def frame_of(crs: CRS | None) -> str:
    """Canonical text of a CRS: its authority code when that names exactly this CRS, else WKT2; `pixels` for none."""
    if crs is None or not crs.to_wkt():
        return PIXELS
    authority = crs.to_authority()
    if authority is not None:
        code = ":".join(authority)
        try:
            if CRS.from_user_input(code) == crs:
                return code
        except CRSError:
            pass
    return crs.to_wkt(version="WKT2_2019")


def crs_of(frame: str) -> CRS | None:
    """The CRS of a frame, None for `pixels`."""
    return None if frame == PIXELS else CRS.from_user_input(frame)


def grid_of(transform: Affine, shape: Sequence[int], crs: CRS | None, name: str = "raster") -> Grid:
    """The grid of `shape` (rows, cols) under GDAL's corner `transform`. Raises InputError("bad_geometry")."""
    a, b, c, d, e, f = tuple(transform)[:6]
    affine = np.array([[b, a, c + (a + b) / 2], [e, d, f + (d + e) / 2], [0, 0, 1]], dtype=np.float64)
    if not np.isfinite(affine).all() or a * e - b * d == 0:
        raise InputError("bad_geometry", f"{name}: geotransform {(a, b, c, d, e, f)} cannot be inverted; correct it")
    return Grid(tuple(shape), affine, frame_of(crs))


def transform_of(grid: Grid) -> Affine:
    """GDAL's corner transform of a grid (rank 2)."""
    (b, a, x), (e, d, y), _ = grid.affine.tolist()
    return Affine(a, b, x - (a + b) / 2, d, e, y - (d + e) / 2)


class CellArea:
    """True area of the cells of a grid, by window, the same whatever the window.

    `unit` names the area ("m2", or "cells" where the frame is `pixels`); `quantum` is the area of one count.
    Raises InputError("bad_geometry") when a corner of the grid lies off the earth of its CRS.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.unit, self._spline = grid, "m2", None
        if grid.frame == PIXELS:
            self.unit, typical = "cells", 1.0
        else:
            rows, cols = (np.linspace(-0.5, n - 0.5, NODES) for n in grid.shape)
            nodes = self._exact(*np.meshgrid(rows, cols, indexing="ij"))
            if not np.isfinite(nodes).all():
                raise InputError(
                    "bad_geometry", f"part of the grid {grid.shape} lies off the earth of {grid.frame[:60]}; crop it"
                )
            self._spline, typical = RectBivariateSpline(rows, cols, nodes, s=0), float(nodes.max())
        self.quantum = 2.0 ** (np.floor(np.log2(typical)) - CELL_BITS)

    def counts(self, window: Window) -> np.ndarray:
        """Areas in counts of `quantum`, (rows, cols) int64: their sums are exact in any order."""
        if self._spline is None:
            return np.full(window.size, round(1 / self.quantum), dtype=np.int64)
        rows, cols = (np.arange(s, s + n) for s, n in zip(window.start, window.size, strict=True))
        return np.rint(self._spline(rows, cols) / self.quantum).astype(np.int64)

    def hectares(self, counts: int) -> float:
        """Counts as hectares; as cells where there is no CRS."""
        return counts * self.quantum / (1 if self.unit == "cells" else METRES2_PER_HECTARE)

    def _exact(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Area in m2 of the cells centred at (row, col), by central differences over the cell."""
        crs = pyproj.CRS.from_user_input(self.grid.frame)
        base, ellipsoid = crs.geodetic_crs, crs.ellipsoid
        if base is None or ellipsoid is None:  # an engineering plane: no earth under it
            factor = crs.axis_info[0].unit_conversion_factor if crs.axis_info else 1.0
            return np.full(row.shape, self.grid.cell_volume * factor**2)
        to_degrees = pyproj.Transformer.from_crs(crs, base, always_xy=True)

        def place(r: np.ndarray, c: np.ndarray) -> np.ndarray:
            x, y = np.einsum("ij,j...->i...", self.grid.affine[:2], np.stack([r, c, np.ones_like(r)]))
            degrees = np.array(to_degrees.transform(x, y))
            return np.radians(np.where(np.isfinite(degrees), degrees, np.nan))

        by_row, by_col = place(row + 0.5, col) - place(row - 0.5, col), place(row, col + 0.5) - place(row, col - 0.5)
        for step in (by_row, by_col):
            step[0] = (step[0] + np.pi) % (2 * np.pi) - np.pi  # across the date line
        a, flat = ellipsoid.semi_major_metre, ellipsoid.inverse_flattening
        e2 = 0.0 if not flat else (2 - 1 / flat) / flat
        sine, cosine = np.sin(place(row, col)[1]), np.cos(place(row, col)[1])
        element = a**2 * (1 - e2) * cosine / (1 - e2 * sine**2) ** 2  # M N cos(lat)
        return np.abs(by_row[0] * by_col[1] - by_row[1] * by_col[0]) * element
