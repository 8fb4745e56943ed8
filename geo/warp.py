"""A raster on another grid, lazily, CRS included: the window read is the whole read, bit for bit.

GDAL picks a kernel scale and an approximate transform per request, so two requests for one cell may differ. Here the
kernel scale is given (true ratio of the grids), the transform is exact to 1e-6 of a cell, and every cell is always made
by the same request: the chunk of a fixed lattice that it lies in. So no window, tile or order of reads changes a value.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyproj
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterWindow

from geo.crs import crs_of, transform_of
from geo.raster import RasterSource, calibrated, raster_env
from medmamba.errors import ConfigError, InputError
from medmamba.grid import PIXELS, Grid
from medmamba.sample import Image
from medmamba.windows import Window

TOLERANCE = 1e-6  # of a cell, for the transform; 0 would crash rasterio 1.4
KEPT_BYTES = 32 * 2**20  # chunks kept in memory by one aligned source
PLANE = "EPSG:3857"  # stands for the plane of rasters without a CRS: never reprojected, only moved
RESAMPLING = {
    "nearest": Resampling.nearest,
    "bilinear": Resampling.bilinear,
    "cubic": Resampling.cubic,
    "average": Resampling.average,
}


class CroppedSource:
    """A box of a source, whole cells of its own grid: nothing is resampled."""

    def __init__(self, source: RasterSource, start: Sequence[int], shape: Sequence[int]) -> None:
        self.source, self.start = source, tuple(start)
        self.grid = source.grid.crop(start, shape)
        self.channels, self.dtype = source.channels, source.dtype
        self.units, self.notes = source.units, source.notes
        self.options: dict[str, Any] = {"resampling": "none", "start": list(self.start)}

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        start = tuple(s + o for s, o in zip(window.start, self.start, strict=True))
        image = self.source.read(Window(start=start, size=window.size))
        return Image(image.array, self.grid.crop(window.start, window.size), self.channels, image.valid)

    def close(self) -> None:
        """Lets the file go."""
        self.source.close()


class AlignedSource:
    """A raster on `grid` (any CRS, resolution, offset). `shift_px`: cell i shows what lay at i + shift (rows, cols).

    Cells outside of the raster are not valid. `options` are what the warp was told, for the report.
    """

    def __init__(
        self,
        source: RasterSource,
        grid: Grid,
        *,
        resampling: str = "bilinear",
        shift_px: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        if resampling not in RESAMPLING:
            raise ConfigError(f"resampling {resampling!r} unknown; known: {', '.join(RESAMPLING)}")
        self.source, self.grid, self.shift_px = source, grid, shift_px
        self.channels, self.dtype = source.channels, source.dtype
        self.units, self.notes = source.units, source.notes
        seen = Grid(grid.shape, grid.affine @ translation(shift_px), grid.frame)
        ratio = scale_of(source.grid, seen)
        self.options = {"resampling": resampling, "tolerance": TOLERANCE, "shift_px": list(shift_px)}
        self.options |= {"XSCALE": ratio[1], "YSCALE": ratio[0], "UNIFIED_SRC_NODATA": "YES"}
        data, own = source.dataset, source.calibration.nodata
        colours = data.colorinterp
        self._alpha = colours.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in colours else 0
        extra = {} if self._alpha else {"add_alpha": True, "DST_ALPHA_MAX": 255}
        with raster_env():
            self._warped = WarpedVRT(
                data,
                src_crs=data.crs or CRS.from_user_input(PLANE),
                crs=crs_of(grid.frame) or CRS.from_user_input(PLANE),
                src_transform=data.transform,
                transform=transform_of(seen),
                height=grid.shape[0],
                width=grid.shape[1],
                resampling=RESAMPLING[resampling],
                src_nodata=own if data.nodata is None else data.nodata,
                tolerance=TOLERANCE,
                XSCALE=repr(ratio[1]),
                YSCALE=repr(ratio[0]),
                UNIFIED_SRC_NODATA="YES",
                **extra,
            )
        self.chunk: tuple[int, int] = self._warped.block_shapes[0]
        self._kept: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._kept_bytes = 0

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        stored = np.empty((len(self.channels), *window.size), dtype=self.source.stored)
        valid = np.empty(window.size, dtype=bool)
        first = [s // c for s, c in zip(window.start, self.chunk, strict=True)]
        last = [(e - 1) // c for e, c in zip(window.stop, self.chunk, strict=True)]
        with self.source.lock:
            for place in np.ndindex(last[0] - first[0] + 1, last[1] - first[1] + 1):
                index = (first[0] + place[0], first[1] + place[1])
                piece, mask = self._chunk(index)
                low = [i * c for i, c in zip(index, self.chunk, strict=True)]
                start = [max(s, b) for s, b in zip(window.start, low, strict=True)]
                stop = [min(e, b + n) for e, b, n in zip(window.stop, low, mask.shape, strict=True)]
                here = tuple(slice(a - s, b - s) for a, b, s in zip(start, stop, window.start, strict=True))
                there = tuple(slice(a - s, b - s) for a, b, s in zip(start, stop, low, strict=True))
                stored[(slice(None), *here)] = piece[(slice(None), *there)]
                valid[here] = mask[there]
        array = calibrated(stored, self.source.calibration)
        return Image(array, self.grid.crop(window.start, window.size), self.channels, valid)

    def close(self) -> None:
        """Lets the file go."""
        self._kept.clear()
        self._warped.close()
        self.source.close()

    def _chunk(self, index: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Stored numbers and valid mask of one chunk, always made by the same request; the last used are kept."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        start = [i * c for i, c in zip(index, self.chunk, strict=True)]
        size = [min(c, n - s) for c, n, s in zip(self.chunk, self.grid.shape, start, strict=True)]
        place = RasterWindow(start[1], start[0], size[1], size[0])
        alpha = self._alpha or self._warped.count
        try:
            with raster_env():
                read = self._warped.read([*self.source.bands, alpha], window=place)
        except RasterioError as error:
            raise InputError(
                "corrupt_file",
                f"{self.source.path}: cannot be warped around row {start[0]}, column {start[1]}: {error}",
            ) from error
        stored, mask = read[:-1].astype(self.source.stored, copy=False), read[-1] >= (1 if self._alpha else 128)
        if stored.dtype.kind == "f":
            mask &= np.isfinite(stored).all(axis=0)
        self._kept[index] = stored, mask
        self._kept_bytes += stored.nbytes + mask.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, (old, old_mask) = self._kept.popitem(last=False)
            self._kept_bytes -= old.nbytes + old_mask.nbytes
        return stored, mask


def index_of(grid: Grid, other: Grid, index: np.ndarray) -> np.ndarray:
    """Where cells (2, N) of `other` lie in `grid`, as fractional (row, col); infinite where they cannot be brought."""
    x, y = other.affine[:2, :2] @ index + other.affine[:2, 2:]
    if grid.frame != other.frame:
        try:
            to_grid = pyproj.Transformer.from_crs(other.frame, grid.frame, always_xy=True)
        except pyproj.exceptions.ProjError as error:
            raise InputError(
                "no_overlap", f"{other.frame[:60]} cannot be brought to {grid.frame[:60]}: {error}"
            ) from None
        x, y = to_grid.transform(x, y)
    return np.linalg.solve(grid.affine[:2, :2], np.stack([x, y]) - grid.affine[:2, 2:])


def translation(shift_px: tuple[float, float]) -> np.ndarray:
    """Index i to i + shift, (3, 3)."""
    matrix = np.eye(3)
    matrix[:2, 2] = shift_px
    return matrix


def scale_of(source: Grid, target: Grid) -> tuple[float, float]:
    """Target cells per source cell along the source's rows and columns, at the middle of the target."""
    middle = (np.array(target.shape, dtype=float)[:, None] - 1) / 2
    steps = middle + 0.5 * np.array([[1, -1, 0, 0], [0, 0, 1, -1]])
    row_col = index_of(source, target, steps)
    by_row, by_col = row_col[:, 0] - row_col[:, 1], row_col[:, 2] - row_col[:, 3]
    ratio = 1 / np.hypot(by_row, by_col)
    if not np.isfinite(ratio).all():
        return 1.0, 1.0
    return tuple(1.0 if abs(r - 1) < 0.01 else float(f"{r:.6g}") for r in ratio)  # type: ignore[return-value]


def cell_side(grid: Grid) -> float:
    """Side of a cell in metres at the middle of the grid, to tell fine from coarse; in cells without a CRS."""
    if grid.frame == PIXELS:
        return 1.0
    crs = pyproj.CRS.from_user_input(grid.frame)
    factor = crs.axis_info[0].unit_conversion_factor if crs.axis_info else 1.0
    if crs.is_geographic and crs.ellipsoid is not None:
        factor *= crs.ellipsoid.semi_major_metre  # the factor of degrees is to radians
    return float(np.sqrt(grid.cell_volume)) * factor
