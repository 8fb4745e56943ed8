"""One pair from two scenes to its products: align, preprocess, infer, decode, rasters, polygons, page, report last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geo.crs import CellArea
from geo.formats.geotiff import CogSink
from geo.quality import observability
from geo.raster import RasterSource
from geo.stac import ProductFile
from medmamba.bundle import Bundle
from pipelines.cases.case import Case
from pipelines.cases.pair_archive import parts_of, predicted_scratch
from pipelines.cases.state import STATE
from pipelines.pages.change import take_pictures, write_page, write_quicklook
from pipelines.report import Report, case_key, now
from pipelines.serving.budget import require_disk
from pipelines.serving.pair_products import (
    ChangeSink,
    Products,
    colours_of,
    date_of,
    disk_bytes,
    layers_of,
    measure,
    names_of,
    number,
    raster_files,
    write_stac,
)
from pipelines.serving.pair_view import ROLES, STRIP, PairView, aligned_pair, open_pair, require_bands
from pipelines.serving.predict import MODES, Predictor, Scratch, run_facts, told
from pipelines.serving.products import outputs_of, product_path
from pipelines.tasks import build_task, change_of
from pipelines.tasks.change import Change


def predict_pair(
    predictor: Predictor, case: Case, output: Path, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Runs one pair and writes its products (`pipelines.serving.pair_products`), the report last, each file atomically.

    A process that died inside the scene is taken up behind its last finished rows. Raises InputError for a pair that
    cannot be compared.
    """
    started, began = time.perf_counter(), now()
    bundle, task = predictor.bundle, change_of(predictor.task)
    inputs = {role: told(path, parts_of) for role, path in case.files.items()}
    hashes = {role: str(v["sha256"]) for role, v in inputs.items() if role in bundle.preprocessing.roles}
    key = case_key(hashes, bundle, predictor.mode)
    stem = (output / bundle.title) / case.id
    view = open_pair(case.files, task.comparison)
    try:
        require_disk(output, disk_bytes(view.grid, task) + predicted_scratch(bundle, case, predictor.mode))
        area = CellArea(view.grid)
        notes = rasters(predictor, task, view, stem, Scratch(folder=output / STATE / "stream", key=key), progress)
        made = measure(stem, task, bundle, case, area)
        observed = observability(view.qualities, area)
        warnings = [*notes.pop("steps", ()), *view.notes, *doubts(view, made)]
        run = run_facts(predictor, notes, began, started)
        pictures = shown(stem, task, view, case, bundle, made, observed, warnings, run)
    finally:
        view.close()
    item = stem.with_name(f"{stem.name}_stac.json")
    files = (*made.files, *pictures)
    write_stac(item, case, view.grid, files, bundle, predictor.run)
    report = Report(
        case=case.id,
        key=key,
        status="done",
        bundle={"name": bundle.name, "id": bundle.id},
        inputs=inputs,
        outputs=outputs_of(stem.parent, [*(f.path for f in files), item]),
        grid={"shape": list(view.grid.shape), "affine": view.grid.affine.tolist(), "frame": view.grid.frame},
        numbers={**made.numbers, "observability": observed, **view.record},
        warnings=tuple(warnings),
        group=case.group,
        run={**run, "seconds": round(time.perf_counter() - started, 3)},
    )
    report.save(product_path(output, bundle, case, ".json"))
    return report


def headers(bundle: Bundle, case: Case) -> tuple[int, int]:
    """Cells of the ground that both dates show, and bytes of disk that the rasters of the pair take at most; no cell is
    read. Raises InputError for a pair that cannot be compared."""
    task = change_of(build_task(bundle.task))
    found = aligned_pair(case.files, task.comparison)
    for scene in found.sources:
        scene.close()
    require_bands(found.sources[0], bundle.preprocessing)
    return int(np.prod(found.grid.shape, dtype=object)), disk_bytes(found.grid, task)


def rasters(
    predictor: Predictor,
    task: Change,
    view: PairView,
    stem: Path,
    scratch: Scratch,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Writes the rasters of a pair; what the loop did."""
    seen = view.seen(predictor.bundle.preprocessing)
    tags = {"model": predictor.bundle.title, "key": scratch.key}
    paths = raster_files(stem, task)
    layers = layers_of(task, tags)
    sinks = {n: CogSink(paths[n], view.grid, layers[n], key=scratch.key) for n in layers}
    sink = ChangeSink(task, sinks, view.qualities)
    place = Scratch(folder=scratch.folder / stem.name, key=scratch.key, strip=STRIP, finished=sink.finished)
    notes = MODES[predictor.mode](
        predictor, seen, predictor.bundle.preprocessing.inverse(sink, view.grid), place, progress
    )
    sink.close()
    return notes


def shown(
    stem: Path,
    task: Change,
    view: PairView,
    case: Case,
    bundle: Bundle,
    made: Products,
    observed: Mapping[str, Any],
    warnings: list[str],
    run: Mapping[str, Any],
) -> tuple[ProductFile, ...]:
    """Quicklook and page."""
    layer = task.layers[-1]  # what became of the ground, where the task knows it
    names = {value: name for value, name in names_of(layer, task).items() if value}
    colours = colours_of(names)
    codes = RasterSource(raster_files(stem, task)[layer])
    pictures = take_pictures(view.before, view.after, codes, colours)
    codes.close()
    quicklook, page = (stem.with_name(f"{stem.name}_{end}") for end in ("quicklook.png", "page.html"))
    write_quicklook(quicklook, pictures)
    dates = [date_of(case, role) or role for role in ROLES]
    seen = [[*row] for row in observation_rows(observed)]
    unit = observed["unit"]
    write_page(
        page,
        pictures,
        title=f"Change: {case.id}",
        subtitle=f"{' to '.join(dates)}, {bundle.title}; colours: {'what it became' if layer == 'to' else 'change'}",
        names=dates,
        legend=[(names[value], colours[value]) for value in sorted(names)],
        tables=[
            *made.tables,
            {"title": f"What could be seen, {unit}", "note": "", "head": ["", unit], "rows": seen},
            *reliability_tables(bundle),
        ],
        confidence=made.confidence,
        record=view.record,
        provenance=[
            *((role, str(case.files[role])) for role in ROLES),
            ("model", bundle.title),
            ("code", str(run["code"])),
            ("threshold of change", f"{task.threshold:.4g}"),
            ("clouds by", ", ".join(f"{role}: {rule}" for role, rule in view.record["clouds"].items())),
            *(("normalisation", line) for line in normalisation_lines(view.record)),
        ],
        warnings=warnings,
    )
    return (
        ProductFile(path=quicklook, title="before, after, change", roles=("thumbnail",)),
        ProductFile(path=page, title="page with swipe", roles=("overview",)),
    )


def observation_rows(observed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What could be seen, for people."""
    rows = [("on both dates", observed["observed"]), ("under cloud or shadow", observed["not_observable"])]
    return [(name, number(value)) for name, value in [*rows, ("without data", observed["nodata"])]]


def reliability_tables(bundle: Bundle) -> list[dict[str, Any]]:
    """How far the model's probability of change was right on the pairs held out of its training."""
    rows = (bundle.card.get("validation") or {}).get("reliability", ())
    told = [
        [f"{row['from']:.0%} to {row['to']:.0%}", row["pixels"], f"{row['confidence']:.1%}", f"{row['changed']:.1%}"]
        for row in rows
        if row["pixels"]
    ]
    note = "The confidence of this map is calibrated by it: what was said to change against what did."
    head = ["probability of change", "cells", "mean said", "changed"]
    return [{"title": "Reliability on held-out pairs", "note": note, "head": head, "rows": told}] if told else []


def normalisation_lines(record: Mapping[str, Any]) -> list[str]:
    """Gain and offset of each band."""
    return [
        f"{b['band']}: gain {b['gain']:.4g}, offset {b['offset']:.4g}" + ("" if b["used"] else " (poor fit, unused)")
        for b in record.get("normalisation", {}).get("bands", ())
    ]


def doubts(view: PairView, made: Products) -> list[str]:
    """What somebody should know before believing the map."""
    found = []
    registration = view.record.get("registration")
    if registration and registration["verdict"] == "applied":
        found.append(f"the later date was moved: {registration['reason']}")
    unused = [b["band"] for b in view.record.get("normalisation", {}).get("bands", ()) if not b["used"]]
    if unused:
        found.append(f"bands {unused} were not normalised: too few cells look alike on both dates")
    areas = made.numbers["areas"]
    if areas["changed"] == 0:
        found.append("no change was found")
    if areas["changed"] + areas["unchanged"] == 0:
        found.append("no cell could be observed on both dates")
    return found


def lines_of(report: Report) -> list[str]:
    """Areas for the terminal."""
    unit = report.numbers["unit"]
    areas = [f"{name:<24} {number(value):>12} {unit}" for name, value in report.numbers["areas"].items()]
    return [*areas, f"{'polygons':<24} {report.numbers['polygons']['count']:>12}"]
