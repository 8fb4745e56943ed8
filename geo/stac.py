"""One STAC item a product: where and when, which files with which check sums, made from what by which model.

STAC 1.1; extensions processing, projection, file and classification are written as plain fields (names and versions in
EXTENSIONS). Links `derived_from` lead to the input scenes. Files are named relative to the item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pystac
import shapely

from geo.crs import crs_of, transform_of
from medmamba.files import hash_file, write_json
from medmamba.grid import PIXELS, Grid

EXTENSIONS = {
    "processing": "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "projection": "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "file": "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "classification": "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
}
SHA256 = "1220"  # multihash: the code of SHA-256 and its length in bytes
MEDIA = {
    ".tif": pystac.MediaType.COG,
    ".gpkg": pystac.MediaType.GEOPACKAGE,
    ".parquet": pystac.MediaType.PARQUET,
    ".json": pystac.MediaType.JSON,
    ".png": pystac.MediaType.PNG,
    ".html": pystac.MediaType.HTML,
    ".csv": "text/csv",
}
EDGE_POINTS = 9  # a side of the footprint, so that it bends with the projection


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductFile:
    """A file of the product: its `roles` ("data", "metadata", "thumbnail"), and what a class raster's codes mean."""

    path: Path
    title: str
    roles: tuple[str, ...] = ("data",)
    classes: Mapping[int, str] = field(default_factory=dict)
    colours: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a product came to be: the input scenes (addresses), a sentence, software and versions, and the model
    (name, bundle id, registered version, run: text by text). `start` and `end` are the dates compared."""

    inputs: tuple[str, ...]
    sentence: str
    software: Mapping[str, str]
    model: Mapping[str, str]
    created: datetime
    start: datetime | None = None
    end: datetime | None = None


def product_item(name: str, grid: Grid, files: Sequence[ProductFile], lineage: Lineage) -> pystac.Item:
    """The item of a product on `grid`. Every file must be there: its size and check sum are told."""
    geometry, box = footprint(grid)
    dated = lineage.start is not None and lineage.end is not None
    properties: dict[str, Any] = {
        "created": told(lineage.created),
        "processing:lineage": lineage.sentence,
        "processing:software": dict(lineage.software),
        "processing:datetime": told(lineage.created),
        "medmamba:model": dict(lineage.model),
        "proj:shape": list(grid.shape),
        "proj:transform": [*transform_of(grid)[:6], 0.0, 0.0, 1.0],
    }
    crs = crs_of(grid.frame)
    if crs is not None:
        named = re.fullmatch(r"[A-Za-z]+:\w+", grid.frame)
        properties["proj:code"] = grid.frame if named else None
        if not named:
            properties["proj:wkt2"] = grid.frame
    item = pystac.Item(
        id=name,
        geometry=geometry,
        bbox=box,
        datetime=None if dated else lineage.created,
        start_datetime=lineage.start if dated else None,
        end_datetime=lineage.end if dated else None,
        properties=properties,
    )
    item.stac_extensions = list(EXTENSIONS.values())
    for file in files:
        item.add_asset(file.path.name, asset(file))
    for address in lineage.inputs:
        item.add_link(pystac.Link("derived_from", address, media_type=None))
    return item


def asset(file: ProductFile) -> pystac.Asset:
    """A file as STAC names it."""
    extra: dict[str, Any] = {
        "file:size": file.path.stat().st_size,
        "file:checksum": SHA256 + hash_file(file.path),
    }
    if file.classes:
        extra["classification:classes"] = [
            {"value": value, "name": re.sub(r"[^0-9A-Za-z_-]+", "-", text) or "unnamed", "title": text}
            | ({"color_hint": "{:02X}{:02X}{:02X}".format(*file.colours[value])} if value in file.colours else {})
            for value, text in sorted(file.classes.items())
        ]
    return pystac.Asset(
        href=f"./{file.path.name}",
        title=file.title,
        media_type=MEDIA.get(file.path.suffix),
        roles=list(file.roles),
        extra_fields=extra,
    )


def write_item(path: Path, item: pystac.Item) -> None:
    """The item as `path`, atomically."""
    write_json(path, item.to_dict(include_self_link=False))


def footprint(grid: Grid) -> tuple[dict[str, Any] | None, list[float] | None]:
    """Outline in WGS 84 and its box; (None, None) without a CRS and on other celestial bodies."""
    if grid.frame == PIXELS:
        return None, None
    try:
        to_degrees = pyproj.Transformer.from_crs(grid.frame, "OGC:CRS84", always_xy=True)
    except pyproj.exceptions.ProjError:
        return None, None
    t = np.linspace(0, 1, EDGE_POINTS)[:-1]
    zero, one = np.zeros_like(t), np.ones_like(t)
    rows = np.concatenate([zero, t, one, 1 - t]) * grid.shape[0] - 0.5
    cols = np.concatenate([t, one, 1 - t, zero]) * grid.shape[1] - 0.5
    x, y = grid.affine[:2, :2] @ np.stack([rows, cols]) + grid.affine[:2, 2:]
    lon, lat = to_degrees.transform(x, y)
    whole = shapely.normalize(shapely.Polygon(np.stack([lon, lat], axis=1)))
    outline = shapely.geometry.polygon.orient(shapely.set_precision(whole, 1e-7))
    return shapely.geometry.mapping(outline), [float(v) for v in outline.bounds]


def told(moment: datetime) -> str:
    """A moment as STAC writes it: UTC, Z."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
