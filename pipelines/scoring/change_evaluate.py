"""Change maps of a model against labels: scores under every protocol, the threshold and calibration that follow, and
what a model must do whatever the labels: no change between a scene and itself, the same change backwards in time.

Letters: M pairs, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from csv import DictWriter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from geo.quality import unobserved
from medmamba.errors import ConfigError, InputError
from medmamba.files import write_bytes, write_json
from medmamba.source import ArraySink
from medmamba.windows import Window
from pipelines.layouts.change import ChangeSet, PairRow
from pipelines.layouts.change_labels import IGNORED as UNLABELLED
from pipelines.scoring.change_calibration import BINS, ConfidenceTally
from pipelines.scoring.change_metrics import ChangeTally
from pipelines.serving.pair_view import ROLES, open_pair
from pipelines.serving.predict import MODES, Predictor, Scratch
from pipelines.tasks import change_of
from pipelines.tasks.change import DEFAULT_THRESHOLD, Change, SemanticChange, probability

CHECKED_PAIRS = 4
LARGEST_SAME_SCENE = 0.01  # share of a scene that may be named changed against itself


@dataclass(frozen=True, kw_only=True)
class PairMap:
    """What a model says of a pair, (H, W) uint8 each: probability of change in BINS steps, the best class but 0 at both
    dates (semantic change), and where both dates can be seen."""

    steps: np.ndarray
    classes: tuple[np.ndarray, ...]
    valid: np.ndarray

    def changed(self, threshold: float) -> np.ndarray:
        """Where change is named; `threshold` a multiple of 1 / BINS."""
        return self.steps >= round(threshold * BINS)

    def maps(self, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Change and the classes at both dates, 0 where nothing changed."""
        changed = self.changed(threshold)
        earlier, later = (np.where(changed, c, 0) for c in self.classes)
        return changed, earlier, later


class _PairSink:
    """A sink that keeps probability and classes."""

    def __init__(self, task: Change, shape: tuple[int, ...]) -> None:
        self.count = len(task.classes) if isinstance(task, SemanticChange) else 0
        self.kept = ArraySink(3 if self.count else 1, shape, "uint8")

    def write(self, window: Window, array: np.ndarray) -> None:
        rows = [np.minimum(probability(array) * BINS, BINS - 1).astype(np.uint8)]
        for date in (array[2 : 2 + self.count], array[2 + self.count :]) if self.count else ():
            rows.append((1 + date[1:].argmax(0)).astype(np.uint8))
        self.kept.write(window, np.stack(rows))

    def close(self) -> None:
        """Nothing to do: the array is the result."""


def map_pair(predictor: Predictor, files: Mapping[str, Path]) -> PairMap:
    """Predicts the pair of `files` (before, after) as production does, without registration."""
    task = change_of(predictor.task)
    view = open_pair(files, replace(task.comparison, register="none"))
    try:
        sink = _PairSink(task, view.grid.shape)
        with TemporaryDirectory() as spare:
            place = Scratch(folder=Path(spare), key="")
            MODES[predictor.mode](predictor, view.seen(predictor.bundle.preprocessing), sink, place, None)
        valid = unobserved(view.qualities, Window.whole(view.grid.shape)) == 0
    finally:
        view.close()
    steps, *classes = sink.kept.array
    return PairMap(steps=steps, classes=tuple(classes), valid=valid)


@dataclass(frozen=True, kw_only=True)
class ChangeEvaluation:
    """Scores of M pairs. `at_threshold` by protocol, at the `threshold` of the best F1 on these very pairs; `at_half`
    at the default one; `confidence` before calibration."""

    at_threshold: Mapping[str, ChangeTally]
    at_half: ChangeTally
    confidence: ConfidenceTally
    threshold: float
    seed: int = 0

    def figures(self) -> dict[str, float]:
        """For the log; what is undefined is left out."""
        told = {
            "validation_f1": self.at_half.figures()["f1"],
            "validation_iou": self.at_half.figures()["iou"],
            "validation_f1_at_threshold": self.at_threshold["binary"].figures()["f1"],
            "validation_threshold": self.threshold,
            "validation_calibration_error": self.confidence.calibration_error(),
        }
        for protocol, tally in self.at_threshold.items():
            if protocol != "binary":
                told |= {f"validation_{name}/{protocol}": tally.figures()[name] for name in ("miou", "sek", "f_scd")}
        return {name: float(value) for name, value in told.items() if value is not None}

    def summary(self) -> dict[str, Any]:
        """Everything as JSON, each figure under its protocol with its 95 % interval over images."""
        protocols = {
            name: {"figures": tally.figures(), "interval_95": tally.intervals(seed=self.seed)}
            for name, tally in self.at_threshold.items()
        }
        return {
            "threshold": self.threshold,
            "threshold_chosen_on": "these pairs: figures at it are a little too good, those at 0.5 are not",
            "at_threshold": protocols,
            "at_0.5": self.at_half.figures(),
            "calibration_error": self.confidence.calibration_error(),
            "reliability": self.confidence.reliability(),
        }

    def save(self, output: Path) -> None:
        """`change_evaluation.json` and `reliability.csv` in the folder, atomically."""
        summary = self.summary()
        text = io.StringIO()
        table = DictWriter(text, list(summary["reliability"][0]), lineterminator="\n")
        table.writeheader()
        table.writerows(summary["reliability"])
        write_bytes(output / "reliability.csv", text.getvalue().encode())
        write_json(output / "change_evaluation.json", summary)


def evaluate_pairs(
    predictor: Predictor,
    dataset: ChangeSet,
    rows: Sequence[PairRow],
    *,
    threshold: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ChangeEvaluation:
    """Predicts every pair and scores it where both dates and the labels are valid. `threshold`: chosen here unless
    given. Raises InputError for a pair that cannot be read, ConfigError where labels and images differ in size."""
    found: list[tuple[PairRow, PairMap, tuple[np.ndarray, ...], np.ndarray]] = []
    confidence = ConfidenceTally()
    for number, row in enumerate(rows, start=1):
        told, truth = map_pair(predictor, row.files), dataset.labels(row)
        if truth[0].shape != told.steps.shape:
            raise ConfigError(f"pair {row.id!r}: labels {truth[0].shape} on images {told.steps.shape}")
        valid = told.valid & np.logical_and.reduce([ids != UNLABELLED for ids in truth[1:]], initial=True)
        confidence.add((told.steps + 0.5) / BINS, truth[0], valid)
        found.append((row, told, truth, valid))
        if progress:
            progress(number, len(rows))
    chosen = best_threshold(confidence) if threshold is None else round(threshold * BINS) / BINS
    task = change_of(predictor.task)
    protocols = ("binary", "per_date", "from_to") if isinstance(task, SemanticChange) else ("binary",)
    count = len(task.classes) if isinstance(task, SemanticChange) else 2
    tallies = {name: ChangeTally(name, 2 if name == "binary" else count) for name in protocols}
    half = ChangeTally("binary")
    for row, told, truth, valid in found:
        half.add_binary(row.id, told.changed(DEFAULT_THRESHOLD), truth[0], valid=valid, group=row.group)
        for name, tally in tallies.items():
            if name == "binary":
                tally.add_binary(row.id, told.changed(chosen), truth[0], valid=valid, group=row.group)
            else:
                reference = truth[0], *(np.where(ids == UNLABELLED, 0, ids) for ids in truth[1:])
                tally.add_semantic(row.id, told.maps(chosen), reference, valid=valid, group=row.group)  # type: ignore[arg-type]
    return ChangeEvaluation(at_threshold=tallies, at_half=half, confidence=confidence, threshold=chosen, seed=seed)


def best_threshold(confidence: ConfidenceTally) -> float:
    """Of the best F1; the default where nothing changed in the held-out pairs."""
    return confidence.threshold()[0] if confidence.changed.any() else DEFAULT_THRESHOLD


def check_model(predictor: Predictor, pairs: Sequence[Mapping[str, Path]], threshold: float) -> dict[str, float]:
    """What the model says of a scene against itself, and of pairs backwards in time.

    `same_scene_changed`: largest share of changed cells of f(A, A). `swap_iou`: change of f(A, B) and of f(B, A), over
    all pairs together; `swap_matrix_mismatch` (semantic): share of the changed cells by which the matrix of f(B, A)
    differs from the transposed one of f(A, B).
    """
    same, both, either = 0.0, 0, 0
    matrices: list[tuple[np.ndarray, np.ndarray]] = []
    for files in pairs:
        before, after = files["before"], files["after"]
        itself = map_pair(predictor, {"before": before, "after": before})
        same = max(same, float((itself.changed(threshold) & itself.valid).sum() / max(itself.valid.sum(), 1)))
        there, back = map_pair(predictor, files), map_pair(predictor, {"before": after, "after": before})
        valid = there.valid & back.valid
        one, other = there.changed(threshold) & valid, back.changed(threshold) & valid
        both, either = both + int((one & other).sum()), either + int((one | other).sum())
        if there.classes:
            matrices.append((matrix_of(there, one), matrix_of(back, other)))
    told = {"same_scene_changed": same, "swap_iou": both / either if either else 1.0}
    if matrices:
        first, second = (np.sum([pair[i] for pair in matrices], axis=0) for i in (0, 1))
        changed = max(int(first.sum()), int(second.sum()), 1)
        told["swap_matrix_mismatch"] = float(np.abs(first - second.T).sum() / (2 * changed))
    return told


def matrix_of(told: PairMap, changed: np.ndarray) -> np.ndarray:
    """Changed cells by class at the earlier (rows) and at the later date (columns)."""
    codes = told.classes[0][changed].astype(np.int64) * BINS + told.classes[1][changed]
    counts: np.ndarray = np.bincount(codes, minlength=BINS * BINS).reshape(BINS, BINS)
    return counts


def usable(rows: Sequence[PairRow]) -> list[dict[str, Path]]:
    """The pairs of at most CHECKED_PAIRS rows, evenly taken."""
    taken = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(CHECKED_PAIRS, len(rows)))]
    return [{role: row.files[role] for role in ROLES} for row in taken]


def require_pairs(rows: Sequence[PairRow]) -> None:
    """Raises InputError when a file of a row is not there."""
    for row in rows:
        for role, path in row.files.items():
            if not path.is_file():
                raise InputError("missing_file", f"pair {row.id!r}: {role} {path} is not there")
