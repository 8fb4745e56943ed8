"""Change maps on disk against the labels of a data set: the products of a batch, or maps that somebody published.

A map of pair `<id>` is `<id>_change.tif` with `_from.tif` and `_to.tif` beside it for semantic change (what `predict`
writes; 254 and 255 are not scored), or a picture `<id>` of 0 and 1, or 0 and 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo.formats.geotiff import UNOBSERVABLE
from geo.raster import RasterSource
from medmamba.errors import ConfigError
from medmamba.files import write_json
from medmamba.windows import Window
from pipelines.layouts.change import SUFFIXES, ChangeSet, PairRow
from pipelines.layouts.change_labels import IGNORED as UNLABELLED
from pipelines.layouts.change_labels import read_change
from pipelines.scoring.change_metrics import ChangeTally

SHOWN = ("f1", "iou", "precision", "recall", "oa", "kappa", "miou", "sek", "f_scd", "score")


@dataclass(frozen=True, kw_only=True)
class MapScores:
    """Maps of M pairs by protocol; `seed` of the intervals."""

    tallies: Mapping[str, ChangeTally]
    seed: int = 0

    def summary(self) -> dict[str, Any]:
        """Figures under each protocol with their 95 % interval over scenes, and the matrix they come from."""
        return {
            name: {
                "figures": tally.figures(),
                "interval_95": tally.intervals(seed=self.seed),
                "images": tally.images,
                "scenes": len(set(tally.groups)),
                "matrix": tally.matrices.sum(0).tolist(),
            }
            for name, tally in self.tallies.items()
        }

    def table(self) -> list[str]:
        """The summary in lines for a person."""
        lines = []
        for protocol, told in self.summary().items():
            lines.append(f"{protocol}, {len(told['images'])} pairs of {told['scenes']} scenes:")
            for name in (name for name in SHOWN if told["figures"].get(name) is not None):
                bounds = told["interval_95"].get(name)
                span = f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
                lines.append(f"  {name:<10}{told['figures'][name]:.4f}{span}")
        return lines


def evaluate_maps(dataset: ChangeSet, folder: Path, *, output: Path | None = None, seed: int = 0) -> MapScores:
    """The maps in `folder` against the test pairs of a data set (all pairs where it names none for testing).

    `change_evaluation.json` is written into `output`. Raises ConfigError listing pairs without a map, or where map and
    labels differ in size; InputError for a file that cannot be read.
    """
    rows = [row for row in dataset.rows if row.split == "test"] or list(dataset.rows)
    found = {row.id: map_of(row, folder) for row in rows}
    missing = [f"  {name}" for name, path in found.items() if path is None]
    if missing:
        raise ConfigError(f"{folder}: {len(missing)} of {len(rows)} pairs without a map\n" + "\n".join(missing))
    paths = {name: path for name, path in found.items() if path is not None}
    semantic = dataset.classes is not None and all(beside(path, "to").is_file() for path in paths.values())
    count = len(dataset.classes.names) if dataset.classes is not None else 2
    protocols = ("binary", "per_date", "from_to") if semantic else ("binary",)
    tallies = {name: ChangeTally(name, 2 if name == "binary" else count) for name in protocols}
    for row in rows:
        path = paths[row.id]
        maps, valid = read_map(path, dataset.classes.names if semantic and dataset.classes else ())
        truth = dataset.labels(row)
        if truth[0].shape != valid.shape:
            raise ConfigError(f"pair {row.id!r}: labels {truth[0].shape} and map {path} {valid.shape} differ in size")
        kept = valid & np.logical_and.reduce([ids != UNLABELLED for ids in truth[1:]], initial=True)
        for name, tally in tallies.items():
            if name == "binary":
                tally.add_binary(row.id, maps[0], truth[0], valid=kept, group=row.group)
            else:
                real = [np.where(kept, ids, 0) for ids in truth]
                told = [np.where(kept, ids, 0) for ids in maps]
                tally.add_semantic(row.id, tuple(told), tuple(real), valid=kept, group=row.group)  # type: ignore[arg-type]
    scores = MapScores(tallies=tallies, seed=seed)
    if output is not None:
        write_json(output / "change_evaluation.json", scores.summary())
    return scores


def map_of(row: PairRow, folder: Path) -> Path | None:
    """The map of a pair: named after its id, or as its pictures are."""
    names = (row.id, row.files["before"].stem)
    places = [f"{name}{end}" for name in names for end in ("_change.tif", *SUFFIXES)]
    return next((folder / place for place in places if (folder / place).is_file()), None)


def beside(path: Path, layer: str) -> Path:
    """Another raster of the same pair; a picture has none."""
    return path.with_name(f"{path.name.removesuffix('_change.tif')}_{layer}.tif")


def read_map(path: Path, classes: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """Change, with `classes` also those at both dates, (H, W) each, and where they say anything."""
    if not path.name.endswith("_change.tif"):
        change = read_change(path)
        return [change], np.ones(change.shape, dtype=bool)
    dates = [read_codes(beside(path, layer), classes) for layer in (("from", "to") if classes else ())]
    change = read_codes(path)
    return [change, *dates], change < UNOBSERVABLE


def read_codes(path: Path, classes: Sequence[str] = ()) -> np.ndarray:
    """Codes (H, W) of a class raster as they are stored. Raises InputError; ConfigError where the raster names its
    codes other than `classes`: the same ids in another order would be scored wrong."""
    raster = RasterSource(path)
    try:
        tags = raster.dataset.tags()
        named = [tags.get(f"class_{code}", name) for code, name in enumerate(classes)]
        codes: np.ndarray = raster.read_stored(Window.whole(raster.grid.shape))[0][0]
    finally:
        raster.close()
    if named != list(classes):
        raise ConfigError(f"{path}: classes {named}, the labels have {list(classes)}; the same ids mean something else")
    return codes
