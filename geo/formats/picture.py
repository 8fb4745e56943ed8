"""Pictures without georeference (PNG, JPEG): decoded once to see that they are whole, then read as rasters."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as Picture

from geo.raster import RasterSource, open_dataset
from medmamba.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_PIXELS = 2**28  # a picture has no random access: more than this belongs into a GeoTIFF


def find(folder: Path) -> list[Path]:
    """Pictures below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())


def open_picture(path: Path) -> RasterSource:
    """A RasterSource of a picture. GDAL passes over damaged streams, so the picture is decoded once before.

    Raises InputError: corrupt_file, too_large and what RasterSource raises.
    """
    data = open_dataset(path)
    rows, cols = data.shape
    data.close()
    if rows * cols > LARGEST_PIXELS:
        raise InputError("too_large", f"{path}: {rows} x {cols} pixels in a {path.suffix} file; convert it to GeoTIFF")
    try:
        with Picture.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError("corrupt_file", f"{path}: the picture cannot be decoded whole ({error})") from error
    return RasterSource(path)
