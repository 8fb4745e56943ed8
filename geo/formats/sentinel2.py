"""Sentinel-2 SAFE products (L1C, L2A) as reflectance, with the offset that the product's own metadata names.

reflectance = (DN + offset) / quantification, DN 0 = no data (ESA, Sentinel-2 Products Specification, baseline 04.00: an
offset of -1000 was added in January 2022, and older dates were made again with it as baseline 05.xx). The list of
offsets decides; where a product of baseline 04.00 or later lacks it, -1000 is taken and said so.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geo.formats.bands import stack
from geo.raster import Calibration, RasterSource
from geo.scene import BandsSource
from medmamba.errors import InputError

SUFFIX = ".safe"
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")  # by band_id
DEFAULT_BANDS = ("B02", "B03", "B04", "B08")  # blue, green, red, near infrared: all at 10 m
OFFSET_SINCE = (4, 0)
OFFSET = -1000.0


@dataclass(frozen=True, kw_only=True)
class Product:
    """What the metadata of a SAFE folder says. `images`: all band files, relative; `offsets` by band id."""

    folder: Path
    level: str
    baseline: str
    date: str
    quantification: float
    offsets: dict[int, float]
    images: tuple[str, ...]
    notes: tuple[str, ...]


def find(folder: Path) -> list[Path]:
    """SAFE folders below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIX) and p.is_dir())


def open_sentinel2(path: Path, *, bands: Sequence[str] = DEFAULT_BANDS) -> BandsSource:
    """Reflectance (float32) of `bands` on the finest of their grids. Raises InputError."""
    product = read_product(path)
    sources = []
    for name in bands:
        if name not in BANDS:
            raise InputError("wrong_channels", f"{path}: band {name!r} is unknown; known: {', '.join(BANDS)}")
        scale = 1 / product.quantification
        offset = product.offsets.get(BANDS.index(name), 0.0) * scale
        calibration = Calibration(scales=(scale,), offsets=(offset,), units="reflectance", nodata=0)
        sources.append(RasterSource(band_file(product, name), names=[name], calibration=calibration))
    offsets = sorted(set(product.offsets.values()))
    told = f"{path.name}: level {product.level}, baseline {product.baseline}, offset {offsets}"
    return stack(path, sources, units="reflectance", notes=(told, *product.notes))


def scene_classes(path: Path) -> RasterSource | None:
    """The scene classification (SCL, 20 m) of an L2A product, None for L1C."""
    product = read_product(path)
    return RasterSource(band_file(product, "SCL"), names=["SCL"]) if product.level == "2A" else None


def acquired(path: Path) -> str:
    """Start of the data take, ISO 8601."""
    return read_product(path).date


def read_product(path: Path) -> Product:
    """The product metadata. Raises InputError: missing_file, corrupt_file, bad_header."""
    files = sorted(path.glob("MTD_MSIL*.xml")) or sorted(path.glob("*MTD_SAF*.xml"))
    if not files:
        raise InputError("missing_file", f"{path}: no MTD_MSIL1C.xml or MTD_MSIL2A.xml; bring the whole SAFE folder")
    try:
        root = ElementTree.parse(files[0]).getroot()
    except ElementTree.ParseError as error:
        raise InputError("corrupt_file", f"{files[0]}: not readable as XML ({error}); copy it again") from error
    level = "2A" if "2A" in files[0].name else "1C"

    def text(*tags: str) -> str:
        for element in root.iter():
            if element.tag.split("}")[-1] in tags and element.text:
                return element.text.strip()
        raise InputError("bad_header", f"{files[0]}: no {' or '.join(tags)}; this is not a whole product description")

    baseline = text("PROCESSING_BASELINE")
    try:
        version = tuple(int(v) for v in baseline.split("."))
        quantification = float(text("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"))
        listed = {int(e.get("band_id", "")): float(e.text or "") for e in root.iter() if is_offset(e.tag)}
    except ValueError as error:
        raise InputError(
            "bad_header", f"{files[0]}: baseline, quantification or offset is no number ({error})"
        ) from error
    notes: tuple[str, ...] = ()
    if not listed and version >= OFFSET_SINCE:
        listed = dict.fromkeys(range(len(BANDS)), OFFSET)
        notes = (f"baseline {baseline} without a list of offsets: {OFFSET:g} taken for every band",)
    return Product(
        folder=path,
        level=level,
        baseline=baseline,
        date=text("PRODUCT_START_TIME"),
        quantification=quantification,
        offsets=listed or dict.fromkeys(range(len(BANDS)), 0.0),
        images=tuple((e.text or "").strip() for e in root.iter() if e.tag.split("}")[-1].startswith("IMAGE_FILE")),
        notes=notes,
    )


def is_offset(tag: str) -> bool:
    """Whether an element is the radiometric offset of one band (L1C and L2A name it differently)."""
    return tag.split("}")[-1] in ("RADIO_ADD_OFFSET", "BOA_ADD_OFFSET")


def band_file(product: Product, name: str) -> Path:
    """The finest file of a band. Raises InputError("missing_file") or ("mixed_series") for several tiles."""
    listed = [product.folder / image for image in product.images]
    files = [p.with_name(p.name + ".jp2") for p in listed if name in p.name.split("_")]
    if not files:
        files = sorted((product.folder / "GRANULE").glob(f"*/IMG_DATA/**/*_{name}*.jp2"))
    if len({p.relative_to(product.folder).parts[1] for p in files}) > 1:
        raise InputError("mixed_series", f"{product.folder}: several tiles in one product; split it first")
    for resolution in ("_10m", "_20m", "_60m", ""):
        for path in files:
            if path.stem.endswith(resolution) and path.exists():
                return path
    raise InputError("missing_file", f"{product.folder}: band {name} is not there (listed: {len(files)} files)")
