"""What a compared pair leaves behind: class rasters and confidence as COGs, polygons, areas, a STAC item, a picture.

File names begin with the case: `_change.tif`, `_from.tif` and `_to.tif` of semantic change, `_confidence.tif`,
`_polygons.gpkg` and `.parquet`, `_transitions` (semantic) or `_areas` (binary) as `.csv` and `.json`, `_quicklook.png`,
`_page.html`, `_stac.json`; the report `_change.json` last.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from geo.crs import CellArea
from geo.formats import FORMATS
from geo.formats.geotiff import CogSink, Layer, class_layer, confidence_layer, disk_needed
from geo.formats.landsat import acquired as landsat_date
from geo.formats.sentinel2 import acquired as sentinel2_date
from geo.quality import unobserved
from geo.raster import RasterSource
from geo.stac import Lineage, ProductFile, product_item, write_item
from geo.transitions import RADIX, FromToSource, class_areas, transitions
from geo.vector import Polygons, polygons
from geo.vector_files import Told, accounting, write_polygons
from medmamba.bundle import Bundle
from medmamba.files import write_bytes, write_json
from medmamba.grid import Grid
from medmamba.preprocessing import slabs
from medmamba.source import Source
from medmamba.windows import Window
from pipelines.cases.case import Case
from pipelines.report import code_version, now
from pipelines.serving.pair_view import ROLES
from pipelines.tasks.change import CHANGED, BinaryChange, Change, SemanticChange

CONFIDENCE = "confidence"
DATES = {"sentinel2": sentinel2_date, "landsat": landsat_date}
PALETTE = (  # by class id from 1 on, again from the start when there are more
    *((230, 75, 53), (77, 187, 213), (0, 160, 135), (60, 84, 136), (243, 155, 127), (145, 209, 194)),
    *((132, 145, 180), (126, 97, 72), (220, 0, 0), (255, 200, 0)),
)
BARS = 10


def colours_of(names: Mapping[int, str]) -> dict[int, tuple[int, int, int]]:
    """A colour for every class but 0."""
    return {value: PALETTE[(value - 1) % len(PALETTE)] for value in names if value}


def names_of(layer: str, task: Change) -> dict[int, str]:
    """What the codes of a class raster mean."""
    return BinaryChange.written_names if layer == "change" else task.written_names


def layers_of(task: Change, tags: Mapping[str, str]) -> dict[str, Layer]:
    """The rasters of a pair, by name."""
    found = {}
    for name in task.layers:
        names = names_of(name, task)
        found[name] = class_layer(names, colours_of(names), **tags)
    return {**found, CONFIDENCE: confidence_layer(**tags)}


def disk_bytes(grid: Grid, task: Change) -> int:
    """Bytes of disk that the rasters of a pair take at worst while they are made."""
    return sum(disk_needed((grid.shape[0], grid.shape[1]), layer) for layer in layers_of(task, {}).values())


class ChangeSink:
    """Scores in, every raster of the task out; 255 where a date has no data, 254 (confidence 255) under clouds."""

    def __init__(self, task: Change, sinks: Mapping[str, CogSink], qualities: Sequence[Source]) -> None:
        self.task, self.sinks, self.qualities = task, sinks, qualities

    def finished(self, box: Window) -> int:
        """Rows of these columns that an earlier process made last in every raster."""
        return min(sink.finished(box) for sink in self.sinks.values())

    def write(self, window: Window, array: np.ndarray) -> None:
        flags = unobserved(self.qualities, window)
        hidden = flags > 0
        for name, values in self.task.decode(array).items():
            over = np.where(hidden, 255, 0).astype(np.uint8) if name == CONFIDENCE else flags
            self.sinks[name].write(window, np.where(hidden[None], over[None], values))

    def close(self) -> None:
        for sink in self.sinks.values():
            sink.close()


@dataclass(frozen=True, kw_only=True)
class Products:
    """Files written, numbers for the report, and what the page needs beside them."""

    files: tuple[ProductFile, ...]
    numbers: dict[str, Any]
    tables: tuple[dict[str, Any], ...]
    confidence: np.ndarray


def raster_files(stem: Path, task: Change) -> dict[str, Path]:
    """The rasters of a pair, by name."""
    return {name: stem.with_name(f"{stem.name}_{name}.tif") for name in (*task.layers, CONFIDENCE)}


def measure(stem: Path, task: Change, bundle: Bundle, case: Case, area: CellArea) -> Products:
    """Polygons, areas and figures from the finished rasters of a pair."""
    rasters = {name: RasterSource(path) for name, path in raster_files(stem, task).items()}
    try:
        codes, legend = change_codes(rasters, task)
        found = polygons(
            codes,
            area,
            frozenset(legend),
            confidence=rasters[CONFIDENCE],
            least_area=task.comparison.least_area,
        )
        dates = [date_of(case, role) for role in ROLES]
        said = Told(legend=legend, date_from=dates[0], date_to=dates[1], model=f"{bundle.name}@{bundle.id[:8]}")
        vectors = write_polygons(stem.with_name(f"{stem.name}_polygons"), found, said)
        areas = class_areas(rasters["change"], area, BinaryChange.written_names)
        unit = "ha" if area.unit == "m2" else "cells"
        matrix, tables = written_matrix(stem, task, rasters, area, areas, unit)
        bars = histogram(rasters[CONFIDENCE])
    finally:
        for raster in rasters.values():
            raster.close()
    account = accounting(found, said)
    numbers = {
        "unit": unit,
        "areas": areas,
        "transitions": matrix[0],
        "polygons": {"count": len(found.kept), "by_change": account},
        "figures": figures(areas, found, unit),
    }
    files = [
        *(product_of(name, path, task) for name, path in raster_files(stem, task).items()),
        *(ProductFile(path=path, title="polygons of change") for path in vectors),
        *(ProductFile(path=path, title="areas of change", roles=("metadata",)) for path in matrix[1]),
    ]
    tables = (*tables, polygon_table(account, unit))
    return Products(files=tuple(files), numbers=numbers, tables=tables, confidence=bars)


def change_codes(rasters: Mapping[str, RasterSource], task: Change) -> tuple[Source, dict[int, tuple[str, str]]]:
    """Codes whose patches become polygons, and (from, to) by code."""
    if isinstance(task, BinaryChange):
        return rasters["change"], {CHANGED: ("any", "changed")}
    names = [(value, name) for value, name in task.written_names.items() if value]
    legend = {a * RADIX + b: (one, other) for a, one in names for b, other in names if a != b}
    return FromToSource(rasters["from"], rasters["to"]), legend


def written_matrix(
    stem: Path,
    task: Change,
    rasters: Mapping[str, RasterSource],
    area: CellArea,
    areas: Mapping[str, float],
    unit: str,
) -> tuple[tuple[Any, tuple[Path, Path]], tuple[dict[str, Any], ...]]:
    """The transition matrix of semantic change, the areas of binary change: values, files, and tables for people."""
    if isinstance(task, SemanticChange):
        found = transitions(rasters["from"], rasters["to"], area, task.written_names)
        told = found.to_json()
        rows = [[name, *map(number, row)] for name, row in zip(found.names, told["from_to"], strict=True)]
        title = f"From (rows) to (columns), {unit}"
        note = "On the diagonal of a class: changed, but within the class."
        table = {"title": title, "note": note, "head": ["", *found.names], "rows": rows}
        return (told, found.save(stem.with_name(f"{stem.name}_transitions"))), (table,)
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow(["class", unit])
    sheet.writerows(areas.items())
    files = tuple(stem.with_name(f"{stem.name}_areas{end}") for end in (".csv", ".json"))
    write_bytes(files[0], text.getvalue().encode())
    write_json(files[1], {"unit": unit, "areas": dict(areas)})
    rows = [[name, number(value)] for name, value in areas.items()]
    return (None, (files[0], files[1])), ({"title": "Areas", "note": "", "head": ["", unit], "rows": rows},)


def figures(areas: Mapping[str, float], found: Polygons, unit: str) -> dict[str, float]:
    """Numbers for MLflow."""
    return {
        f"changed_{unit}": areas["changed"],
        f"unchanged_{unit}": areas["unchanged"],
        f"not_observed_{unit}": areas["not observed"],
        "polygons": float(len(found.kept)),
    }


def polygon_table(account: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    """Polygons by change, for people."""
    rows = [
        [f"{row['from']} to {row['to']}", row["polygons"], number(row["kept"]), number(row["below_mapping_unit"])]
        for row in account
    ]
    note = "Too small: below the minimum mapping unit; counted in the areas, not drawn as polygons."
    return {"title": "Polygons", "note": note, "head": ["", "number", unit, f"too small, {unit}"], "rows": rows}


def number(value: float) -> str:
    """Four figures."""
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def histogram(confidence: RasterSource) -> np.ndarray:
    """Cells by confidence in BARS equal steps of 0..100 percent."""
    bars = np.zeros(BARS, dtype=np.int64)
    for window in slabs(confidence.grid.shape):
        stored, valid = confidence.read_stored(window)
        values = stored[0] if valid is None else stored[0][valid]
        bars += np.bincount(np.minimum(values // (100 // BARS), BARS - 1), minlength=BARS)
    return bars


def product_of(name: str, path: Path, task: Change) -> ProductFile:
    """A raster as the STAC item tells it."""
    if name == CONFIDENCE:
        return ProductFile(path=path, title="confidence in percent")
    names = names_of(name, task)
    return ProductFile(path=path, title=name, classes=names, colours=colours_of(names))


def date_of(case: Case, role: str) -> str:
    """When a scene was taken: as the list says, else as its product says, else empty."""
    if role in case.dates:
        return case.dates[role]
    path = case.files[role]
    return next((DATES[name](path) for name in DATES if FORMATS[name].knows(path)), "")


def moment(text: str) -> datetime | None:
    """An ISO date or time; UTC where nothing else is said. None for anything else."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def write_stac(
    path: Path, case: Case, grid: Grid, files: Sequence[ProductFile], bundle: Bundle, run: Mapping[str, Any]
) -> None:
    """The STAC item of the products, made from what by which model."""
    model = {"name": bundle.name, "bundle": bundle.id, "network": bundle.network}
    told = {"registered": "model", "version": "model_version", "run": "mlflow_run"}
    model |= {key: str(run[name]) for key, name in told.items() if run.get(name)}
    dates = [moment(date_of(case, role)) for role in ROLES]
    lineage = Lineage(
        inputs=tuple(case.files[role].resolve().as_posix() for role in ROLES),
        sentence=f"change between two scenes by {bundle.title}, both brought onto one grid",
        software={"medmamba": code_version()},
        model=model,
        created=datetime.fromisoformat(now()),
        start=dates[0],
        end=dates[1],
    )
    write_item(path, product_item(case.id, grid, files, lineage))
