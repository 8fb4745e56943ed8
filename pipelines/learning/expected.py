"""What labels of the training cohort look like - how large, in how many pieces, how often there at all - and how far a
result lies from that.

Volumes are compared by their logarithm: (log ml - median) / spread, spread = 1.4826 * MAD (the standard deviation where
the logarithms are normal), at least LEAST_SPREAD, so that near-equal training cases do not make every other an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipelines.cases.formats import read_labels
from pipelines.tasks.cleaning import pieces

MOST_CASES = 200  # of a cohort, evenly taken: medians need no more
ENOUGH_CASES = 5  # below this nothing is compared
LEAST_SPREAD = 0.05  # of the volume


def expected(labels: Sequence[Path], values: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Per label value over the label files: `name`, `cases` looked at, `n` that have it, `median_ml`, `spread` of the
    logarithm, `pieces` (the most connected parts seen)."""
    taken = [labels[i] for i in np.linspace(0, len(labels) - 1, min(len(labels), MOST_CASES)).astype(int)]
    volumes: dict[int, list[float]] = {value: [] for value in values}
    most = dict.fromkeys(values, 0)
    for path in taken:
        array, grid = read_labels(path)
        for value, count in pieces(array).items():
            if value in volumes:
                volumes[value].append(int((array == value).sum()) * grid.cell_volume / 1000.0)
                most[value] = max(most[value], count)
    return {
        str(value): {"name": name, "cases": len(taken), "n": len(volumes[value]), "pieces": most[value]}
        | (spread_of(volumes[value]) if volumes[value] else {"median_ml": None, "spread": None})
        for value, name in values.items()
    }


def spread_of(volumes: Sequence[float]) -> dict[str, float]:
    """`median_ml` and robust `spread` of the logarithm of volumes above 0."""
    logs = [math.log(ml) for ml in volumes]
    middle = median(logs)
    return {
        "median_ml": math.exp(middle),
        "spread": max(1.4826 * median(abs(v - middle) for v in logs), LEAST_SPREAD),
    }


def volume_z(volume_ml: float, known: Mapping[str, Any]) -> float | None:
    """How many spreads a volume lies from the median of the training cases; None where nothing can be compared."""
    if volume_ml <= 0 or known["n"] < ENOUGH_CASES:
        return None
    return (math.log(volume_ml) - math.log(known["median_ml"])) / float(known["spread"])


def compare(rows: Mapping[str, dict[str, Any]], labels: np.ndarray, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds to the row of each label of a result (written values as text) what the training cohort says of it:
    `volume_z`, `pieces`, and in `training` the figures it is held against. A cohort of a few cases says nothing."""
    known = {value: row for value, row in known.items() if row["cases"] >= ENOUGH_CASES}
    found = pieces(labels) if known else {}
    for value, row in rows.items():
        if value in known:
            row["volume_z"] = volume_z(row["volume_ml"], known[value])
            row["pieces"] = found.get(int(value), 0)
            row["training"] = {name: known[value][name] for name in ("cases", "n", "median_ml", "pieces")}
