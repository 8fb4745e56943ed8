"""A folder with one band a file (any resolution) as one scene on the grid of its finest band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geo.align import seen_on
from geo.formats.geotiff import SUFFIXES
from geo.raster import RasterSource
from geo.scene import BandsSource
from geo.warp import cell_side
from medmamba.errors import InputError


def stack(
    path: Path,
    bands: Sequence[RasterSource],
    *,
    units: str | None = None,
    notes: tuple[str, ...] = (),
    resampling: str = "bilinear",
) -> BandsSource:
    """Bands of one scene at `path` on the grid of the finest of them. Raises InputError("wrong_units")."""
    told = {b.units for b in bands}
    if units is None and len(told) > 1:
        raise InputError("wrong_units", f"{path}: the bands of one scene are in {sorted(told)}; convert them alike")
    finest = bands[int(np.argmin([cell_side(b.grid) for b in bands]))].grid
    parts = [seen_on(b, finest, resampling=resampling) for b in bands]
    notes = (*notes, *dict.fromkeys(n for b in bands for n in b.notes))
    return BandsSource(path, parts, units=units or told.pop(), notes=notes)


def open_bands(folder: Path) -> BandsSource:
    """The rasters directly in a folder, sorted by name, as the bands of one scene. Raises InputError."""
    files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES))
    if not files:
        raise InputError("missing_file", f"{folder}: no band file ({', '.join(SUFFIXES)}) directly in this folder")
    bands = []
    for path in files:
        source = RasterSource(path)
        count = len(source.channels)
        bands.append(
            RasterSource(path, names=[path.stem if count == 1 else f"{path.stem}:{c}" for c in source.channels])
        )
        source.close()
    return stack(folder, bands)
