"""Readers of scenes, one format a file; `open_scene` asks each whether the path is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geo.formats import bands, geotiff, landsat, picture, sentinel2
from geo.raster import RasterSource
from geo.scene import BandsSource
from medmamba.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SceneFormat:
    """`knows` tells by name and kind whether `open` reads a path; `find` lists the scenes of this format in a folder.
    `quality` opens the scene's own cloud classes, None where it has none."""

    title: str
    knows: Callable[[Path], bool]
    open: Callable[[Path], RasterSource | BandsSource]
    find: Callable[[Path], list[Path]]
    quality: Callable[[Path], RasterSource | None] = lambda path: None


def none_found(folder: Path) -> list[Path]:
    """A folder of bands cannot be told from a folder of scenes: it must be named."""
    return []


FORMATS = {  # asked in this order
    "sentinel2": SceneFormat(
        title="Sentinel-2 SAFE folder",
        knows=lambda p: p.is_dir() and p.name.lower().endswith(sentinel2.SUFFIX),
        open=sentinel2.open_sentinel2,
        find=sentinel2.find,
        quality=sentinel2.scene_classes,
    ),
    "landsat": SceneFormat(
        title="Landsat Collection 2 folder",
        knows=lambda p: p.is_dir() and any(p.glob(f"*{landsat.MTL}")),
        open=landsat.open_landsat,
        find=landsat.find,
        quality=landsat.pixel_quality,
    ),
    "bands": SceneFormat(
        title="folder with one band a file", knows=lambda p: p.is_dir(), open=bands.open_bands, find=none_found
    ),
    "picture": SceneFormat(
        title="PNG, JPEG without georeference",
        knows=lambda p: p.name.lower().endswith(picture.SUFFIXES),
        open=picture.open_picture,
        find=picture.find,
    ),
    "geotiff": SceneFormat(
        title="GeoTIFF, COG, VRT, JPEG 2000",
        knows=lambda p: p.name.lower().endswith(geotiff.SUFFIXES),
        open=geotiff.open_geotiff,
        find=geotiff.find,
    ),
}


def format_of(path: Path) -> SceneFormat:
    """The format of a path. Raises InputError("missing_file") or ("unsupported_format")."""
    if not path.exists():
        raise InputError("missing_file", f"{path}: no such file or folder; correct the list or bring it back")
    for reader in FORMATS.values():
        if reader.knows(path):
            return reader
    known = "; ".join(r.title for r in FORMATS.values())
    raise InputError("unsupported_format", f"{path}: a kind of file that no reader knows; known: {known}")


def open_scene(path: Path) -> RasterSource | BandsSource:
    """A scene (grid at once, values lazily). Raises InputError."""
    return format_of(path).open(path)
