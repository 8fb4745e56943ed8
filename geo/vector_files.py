"""Polygons to GeoPackage and GeoParquet in the CRS of the scene, one row a polygon, atomically."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import geopandas
import pandas
import pyogrio

from geo.crs import crs_of
from geo.vector import Polygons
from medmamba.files import MODE, TEMPORARY, sync_folder

LAYER = "change"
STILL = "1970-01-01T00:00:00.000Z"  # GeoPackage stamps its own clock: equal polygons shall be equal files


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What every row says beside its own numbers: names of from and to by code, the dates, the model version."""

    legend: Mapping[int, tuple[str, str]]
    date_from: str
    date_to: str
    model: str


def table(found: Polygons, told: Told) -> geopandas.GeoDataFrame:
    """id, from, to, area (`area_m2` geodesic, `area_cells` without a CRS), confidence, dates, edge, model, geometry."""
    area = "area_m2" if found.area.unit == "m2" else "area_cells"
    kept = found.kept
    columns = {
        "id": pandas.array([p.id for p in kept], dtype="int64"),
        "from": pandas.array([told.legend[p.code][0] for p in kept], dtype="str"),
        "to": pandas.array([told.legend[p.code][1] for p in kept], dtype="str"),
        area: pandas.array([p.counts * found.area.quantum for p in kept], dtype="float64"),
        "cells": pandas.array([p.cells for p in kept], dtype="int64"),
        "confidence_mean": pandas.array([p.confidence_mean for p in kept], dtype="float64"),
        "confidence_min": pandas.array([p.confidence_min for p in kept], dtype="float64"),
        "edge": pandas.array([p.edge for p in kept], dtype="bool"),
        "date_from": pandas.array([told.date_from] * len(kept), dtype="str"),
        "date_to": pandas.array([told.date_to] * len(kept), dtype="str"),
        "model": pandas.array([told.model] * len(kept), dtype="str"),
    }
    crs = crs_of(found.area.grid.frame)
    return geopandas.GeoDataFrame(
        columns, geometry=[p.geometry for p in kept], crs=None if crs is None else crs.to_wkt(version="WKT2_2019")
    )


def write_polygons(stem: Path, found: Polygons, told: Told) -> tuple[Path, Path]:
    """`<stem>.gpkg` and `<stem>.parquet`: the same rows in the same order, the same bytes for the same polygons."""
    rows = table(found, told)
    stem.parent.mkdir(parents=True, exist_ok=True)
    package, parquet = stem.with_name(f"{stem.name}.gpkg"), stem.with_name(f"{stem.name}.parquet")
    part = package.with_name(f".{package.name}{TEMPORARY}.gpkg")
    part.unlink(missing_ok=True)
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    try:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": STILL})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")  # no georeference: the scene's notes say so
            rows.to_file(part, layer=LAYER, driver="GPKG", engine="pyogrio", geometry_type="Polygon")
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})
    settle(part, package)
    part = parquet.with_name(f".{parquet.name}{TEMPORARY}")
    rows.to_parquet(part, index=False)
    settle(part, parquet)
    return package, parquet


def accounting(found: Polygons, told: Told) -> list[dict[str, float | int | str]]:
    """By from and to: polygons, area kept, and area of those below the minimum mapping unit (hectares or cells)."""
    told_rows: list[dict[str, float | int | str]] = []
    for code in sorted({*(p.code for p in found.kept), *found.dropped}):
        kept = [p for p in found.kept if p.code == code]
        told_rows.append(
            {
                "from": told.legend[code][0],
                "to": told.legend[code][1],
                "polygons": len(kept),
                "kept": found.area.hectares(sum(p.counts for p in kept)),
                "below_mapping_unit": found.area.hectares(found.dropped.get(code, 0)),
                "least_area": found.least_area,
            }
        )
    return told_rows


def settle(part: Path, final: Path) -> None:
    """A written file made last under its final name."""
    with part.open("rb+") as file:
        os.fchmod(file.fileno(), MODE)
        os.fsync(file.fileno())
    part.replace(final)
    sync_folder(final.parent)
