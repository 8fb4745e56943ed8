"""Rasters in: GeoTIFF, COG, VRT, JPEG 2000 and whatever else GDAL reads with a transform, by window.

GDAL's (band, row, col) is the house's (C, y, x) already; the corner transform is turned to cell centres by `geo.crs`.
A cell is not valid when the mask band, the alpha band or the nodata tag of all bands says so, or a value is not finite.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window as RasterWindow

from geo.crs import grid_of
from medmamba.errors import InputError
from medmamba.grid import PIXELS
from medmamba.sample import Image
from medmamba.windows import Window

CACHE_BYTES = 24 * 2**20  # GDAL would take 5 % of the machine; a flat peak wants a fixed block cache


def raster_env() -> rasterio.Env:
    """GDAL's settings while a raster is read or written: a small block cache, one thread, no sidecar written."""
    return rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_NUM_THREADS="1", GDAL_PAM_ENABLED="YES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What stored numbers mean, one entry a band: value = stored * scale + offset, in `units`; `nodata` as stored."""

    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    units: str
    nodata: float | None = None

    @property
    def identity(self) -> bool:
        return set(self.scales) == {1.0} and set(self.offsets) == {0.0}


class RasterSource:
    """A raster file as a Source (C, y, x). `bands` (from 1) default to all but alpha; `calibration` to the file's tags.

    `units` names what the values are: the calibration's ("reflectance"), the file's unit tag, "scaled" where scale or
    offset tags hold, else "DN <dtype>". `notes` tell what the reader of the report should know.
    Raises InputError: missing_file, permission, corrupt_file, empty_image, unsupported_format, bad_geometry.
    """

    def __init__(
        self,
        path: Path,
        *,
        bands: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.path, self.dataset = path, open_dataset(path)
        data = self.dataset
        try:
            with raster_env():  # outside GDAL prints what it finds wrong
                colours, flags = data.colorinterp, data.mask_flag_enums
        except CPLE_BaseError as error:
            raise InputError("corrupt_file", f"{path}: cannot be read ({error})") from error
        self.bands = tuple(bands or (i for i in data.indexes if colours[i - 1] != ColorInterp.alpha))
        if not self.bands or max(self.bands) > data.count:
            raise InputError("wrong_channels", f"{path}: bands {self.bands} asked of {data.count} bands, {colours}")
        stored = np.result_type(*(np.dtype(data.dtypes[b - 1].replace("complex_int16", "c8")) for b in self.bands))
        if stored.kind not in "iuf":
            raise InputError("unsupported_format", f"{path}: values of type {stored}; expected integers or floats")
        self.grid = grid_of(data.transform, data.shape, data.crs, str(path))
        self.channels = tuple(names or (data.descriptions[b - 1] or f"{b}" for b in self.bands))
        self.calibration = calibration or tagged_calibration(data, self.bands)
        self.stored, self.units = stored, self.calibration.units
        self.dtype = stored if self.calibration.identity else np.dtype("float32")
        self.nodata = self.calibration.nodata
        self._masked = any(MaskFlags.all_valid not in flags[b - 1] for b in self.bands)
        self.notes = _notes(data, self.grid.frame)
        self.lock = threading.Lock()  # GDAL's handle takes one thread at a time, whoever reads through it

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        stored, valid = self.read_stored(window)
        array = calibrated(stored, self.calibration)
        return Image(array, self.grid.crop(window.start, window.size), self.channels, valid)

    def read_stored(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """Numbers as stored (C, rows, cols) and the valid mask (None: all)."""
        place = RasterWindow(window.start[1], window.start[0], window.size[1], window.size[0])
        try:
            with self.lock, raster_env():
                stored = self.dataset.read(self.bands, window=place, out_dtype=self.stored)
                masks = self.dataset.read_masks(self.bands, window=place) if self._masked else None
        except RasterioError as error:
            raise InputError(
                "corrupt_file", f"{self.path}: window {window.start} {window.size} cannot be read ({_cause(error)})"
            ) from error
        valid = None if masks is None else (masks > 0).any(axis=0)
        own = self.calibration.nodata
        if own is not None and not self._masked:
            valid = (stored != own).any(axis=0)
        if stored.dtype.kind == "f":
            finite = np.isfinite(stored).all(axis=0)
            valid = finite if valid is None else valid & finite
        return stored, valid

    def close(self) -> None:
        """Lets the file go."""
        self.dataset.close()


def calibrated(stored: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Stored numbers (C, ...) as values: float32 where a scale or offset holds, else untouched."""
    if calibration.identity:
        return stored
    shape = (-1, *(1,) * (stored.ndim - 1))
    scale, offset = (np.array(v, dtype=np.float64).reshape(shape) for v in (calibration.scales, calibration.offsets))
    return (stored * scale + offset).astype(np.float32)


def open_dataset(path: Path) -> rasterio.DatasetReader:
    """A rasterio dataset with at least one band. Raises InputError with a code."""
    if not path.exists():
        raise InputError("missing_file", f"{path}: no such file; correct the manifest or bring it back")
    if not os.access(path, os.R_OK):
        raise InputError("permission", f"{path}: may not be read; give this user read permission")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError("corrupt_file", f"{path}: 0 bytes; copy it again")
    try:
        with raster_env(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            data = rasterio.open(path)
            data.transform, data.gcps  # noqa: B018 - both are read now, where the warning is ours
    except (RasterioIOError, ValueError) as error:
        code = "unsupported_format" if "not recognized as being in a supported file format" in str(error) else ""
        raise InputError(code or "corrupt_file", f"{path}: cannot be opened ({_cause(error)})") from error
    if data.count == 0:
        raise InputError("empty_image", f"{path}: {data.driver} file without a raster band; name the subdataset")
    return data


def tagged_calibration(data: rasterio.DatasetReader, bands: Sequence[int]) -> Calibration:
    """The file's own scale, offset, unit and nodata tags."""
    pick = [b - 1 for b in bands]
    scales, offsets = tuple(data.scales[i] for i in pick), tuple(data.offsets[i] for i in pick)
    units = {data.units[i] for i in pick if data.units[i]}
    plain = set(scales) == {1.0} and set(offsets) == {0.0}
    told = ", ".join(sorted(units)) or (f"DN {data.dtypes[pick[0]]}" if plain else "scaled")
    return Calibration(scales=scales, offsets=offsets, units=told, nodata=data.nodatavals[pick[0]])


def _notes(data: rasterio.DatasetReader, frame: str) -> tuple[str, ...]:
    if frame != PIXELS:
        return ()
    if data.gcps[0]:
        return (f"{len(data.gcps[0])} ground control points but no transform: the frame is pixels; warp it first",)
    if not data.transform.is_identity:
        return ("a transform without a CRS: the unit of its coordinates is unknown, areas are told in cells",)
    return ("no georeference: the frame is pixels, areas are told in cells",)


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error)
