"""Landsat Collection 2 products (level 1 and 2, one folder a scene) as reflectance, with QA_PIXEL.

reflectance = DN * mult + add with the factors of the scene's own MTL file; level 1 is top-of-atmosphere and divided by
the sine of the sun's elevation (USGS, Landsat 8-9 Data Users Handbook, 5.2). DN 0 = fill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from geo.formats.bands import stack
from geo.raster import Calibration, RasterSource
from geo.scene import BandsSource
from medmamba.errors import InputError

MTL = "_MTL.txt"
SURFACE, TOP = "LEVEL2_SURFACE_REFLECTANCE_PARAMETERS", "LEVEL1_RADIOMETRIC_RESCALING"
DEFAULT_BANDS = {  # blue, green, red, near infrared
    "LANDSAT_8": ("B2", "B3", "B4", "B5"),
    "LANDSAT_9": ("B2", "B3", "B4", "B5"),
    "LANDSAT_7": ("B1", "B2", "B3", "B4"),
    "LANDSAT_5": ("B1", "B2", "B3", "B4"),
    "LANDSAT_4": ("B1", "B2", "B3", "B4"),
}


def find(folder: Path) -> list[Path]:
    """Folders below a folder that hold a Landsat scene, sorted."""
    return sorted({p.parent for p in folder.rglob(f"*{MTL}") if p.is_file()})


def open_landsat(path: Path, *, bands: Sequence[str] | None = None) -> BandsSource:
    """Reflectance (float32) of `bands` ("B2", ...), default blue, green, red, near infrared. Raises InputError."""
    described = read_mtl(path)
    craft = described.get("IMAGE_ATTRIBUTES", {}).get("SPACECRAFT_ID", "")
    wanted = bands or DEFAULT_BANDS.get(craft)
    if wanted is None:
        raise InputError("unsupported_format", f"{path}: spacecraft {craft!r}; known: {', '.join(DEFAULT_BANDS)}")
    surface = SURFACE in described
    factors = described.get(SURFACE) or described.get(TOP) or {}
    gain, told = 1.0, "surface reflectance"
    if not surface:
        elevation = number(path, described.get("IMAGE_ATTRIBUTES", {}), "SUN_ELEVATION")
        gain, told = 1 / math.sin(math.radians(elevation)), f"top of atmosphere, sun elevation {elevation:.1f} degrees"
    sources = []
    for name in wanted:
        scale = number(path, factors, f"REFLECTANCE_MULT_BAND_{name[1:]}") * gain
        offset = number(path, factors, f"REFLECTANCE_ADD_BAND_{name[1:]}") * gain
        calibration = Calibration(scales=(scale,), offsets=(offset,), units="reflectance", nodata=0)
        file = band_file(path, described, f"FILE_NAME_BAND_{name[1:]}")
        sources.append(RasterSource(file, names=[name], calibration=calibration))
    return stack(path, sources, units="reflectance", notes=(f"{path.name}: {craft}, {told}",))


def pixel_quality(path: Path) -> RasterSource:
    """The QA_PIXEL band of a scene."""
    return RasterSource(band_file(path, read_mtl(path), "FILE_NAME_QUALITY_L1_PIXEL"), names=["QA_PIXEL"])


def acquired(path: Path) -> str:
    """Date and time of the middle of the scene, ISO 8601."""
    image = read_mtl(path).get("IMAGE_ATTRIBUTES", {})
    return f"{image.get('DATE_ACQUIRED', '')}T{image.get('SCENE_CENTER_TIME', '00:00:00Z')}"


def read_mtl(path: Path) -> dict[str, dict[str, str]]:
    """Entries of the MTL file by group. Raises InputError("missing_file") or ("bad_header")."""
    files = sorted(path.glob(f"*{MTL}"))
    if not files:
        raise InputError("missing_file", f"{path}: no *{MTL}; bring the whole scene folder")
    groups: dict[str, dict[str, str]] = {}
    inside = [""]
    for line in files[0].read_text(errors="replace").splitlines():
        key, _, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            inside.append(value)
        elif key == "END_GROUP":
            inside.pop()
        elif value and inside:
            groups.setdefault(inside[-1], {})[key] = value.strip('"')
    if "IMAGE_ATTRIBUTES" not in groups:
        raise InputError("bad_header", f"{files[0]}: no group IMAGE_ATTRIBUTES; only Collection 2 scenes are read")
    return groups


def number(path: Path, group: Mapping[str, str], key: str) -> float:
    """A number of the MTL file. Raises InputError("bad_header")."""
    try:
        return float(group[key])
    except (KeyError, ValueError):
        raise InputError("bad_header", f"{path}: MTL entry {key} is {group.get(key)!r}; expected a number") from None


def band_file(path: Path, described: Mapping[str, Mapping[str, str]], key: str) -> Path:
    """A file named by the product contents. Raises InputError("missing_file")."""
    name = described.get("PRODUCT_CONTENTS", {}).get(key, "")
    if not name or not (path / name).is_file():
        raise InputError("missing_file", f"{path}: {key} {name!r} is not there; bring the whole scene folder")
    return path / name
