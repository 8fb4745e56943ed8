"""Predicted labels against a reference: a row per case and label, a summary per label; JSON and CSV.

Grids are compared before anything is scored. No case leaves a mean without its n being told.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, GeometryError
from medmamba.files import write_bytes, write_json
from medmamba.formats.nifti import find, label_names, write_labels
from medmamba.grid import Grid
from pipelines.cases.case import safe_id
from pipelines.cases.cohort import LABEL, LabelledCase, rounded
from pipelines.cases.formats import open_source, read_labels, stem_of, suffix_of
from pipelines.cases.manifest import ID_COLUMNS, layout_of, read_rows
from pipelines.layouts.bids import original
from pipelines.scoring.metrics import KINDS, TOLERANCE_MM, Score, interval, score
from pipelines.serving.predict import Predictor, predict_labels, segmentation_of
from pipelines.tasks.segmentation import SUFFIX

FIGURES = ("dice", "nsd", "hd95_mm")
Scored = Mapping[int, tuple[str, tuple[int, ...]]]  # label -> name and the values it covers


@dataclass(frozen=True, kw_only=True)
class Row:
    """One label of one case."""

    case: str
    group: str
    label: int
    name: str
    score: Score

    def flat(self) -> dict[str, Any]:
        return {"case": self.case, "group": self.group, "label": self.label, "name": self.name, **asdict(self.score)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All rows, how they were made (`tolerance_mm`, `seed`), and what the reader must know."""

    rows: tuple[Row, ...]
    tolerance_mm: float = TOLERANCE_MM
    seed: int = 0
    warnings: tuple[str, ...] = ()

    def summary(self) -> list[dict[str, Any]]:
        """Per label: case kinds; n, mean and 95 % interval of each figure over the cases where the label is present on
        either side; `dice_all` counts an absent label rightly left out as 1."""
        labels = sorted({(r.label, r.name) for r in self.rows})
        return [self._label(label, name, [r for r in self.rows if r.label == label]) for label, name in labels]

    def _label(self, label: int, name: str, rows: list[Row]) -> dict[str, Any]:
        present = [r for r in rows if r.score.kind != "TN"]
        told: dict[str, Any] = {"label": label, "name": name, "cases": len(rows), "n": len(present)}
        told |= {kind: sum(r.score.kind == kind for r in rows) for kind in KINDS}
        groups = [r.group for r in present]
        for figure in FIGURES:
            values = [float(getattr(r.score, figure)) for r in present]
            told[figure] = float(np.mean(values)) if values else None
            told[f"{figure}_95"] = interval(values, groups, seed=self.seed) if values else None
        told["hd95_flagged"] = sum(r.score.flagged for r in rows)
        told["dice_all"] = float(np.mean([r.score.dice for r in rows]))
        return told

    def mean(self, figure: str = "dice") -> float | None:
        """Mean over labels of the mean over cases with the label; None when no label is present anywhere."""
        values = [s[figure] for s in self.summary() if s[figure] is not None]
        return float(np.mean(values)) if values else None

    def save(self, output: Path) -> None:
        """`evaluation.json` and `evaluation.csv` in the folder, atomically."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["case", "group", "label", "name", *Score.__dataclass_fields__])
        writer.writeheader()
        writer.writerows(r.flat() for r in self.rows)
        write_bytes(output / "evaluation.csv", text.getvalue().encode())
        values = {
            "tolerance_mm": self.tolerance_mm,
            "seed": self.seed,
            "mean": {figure: self.mean(figure) for figure in FIGURES},
            "labels": self.summary(),
            "rows": [r.flat() for r in self.rows],
            "warnings": list(self.warnings),
        }
        write_json(output / "evaluation.json", values)


def evaluate(
    reference: Path,
    prediction: Path,
    *,
    labels: Mapping[int, str] | None = None,
    ignore: int | None = None,
    output: Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Label files below `prediction` against a folder or manifest (`case`, `label`, optional `group`) of references.

    `labels`: value -> name, by default every value that occurs. Cells with the value `ignore` in the reference are left
    out on both sides. Raises ConfigError listing references without a
    prediction, GeometryError when two grids differ, InputError for a file that cannot be read.
    """
    pairs = match(references(reference), prediction)
    listed = dict(labels) if labels is not None else all_labels([p for pair in pairs for p in (pair[1], pair[2])])
    listed = {value: name for value, name in listed.items() if value != ignore}
    scored = {value: (name, (value,)) for value, name in listed.items()}
    rows: list[Row] = []
    warnings: list[str] = []
    for number, (known, truth_path, path) in enumerate(pairs, start=1):
        (truth, grid), (found, other) = read_labels(truth_path), read_labels(path)
        check_grids(truth_path, grid, path, other)
        found = left_out(found, truth, ignore)
        extra = sorted(set(np.unique(found).tolist()) - {0, *listed})
        if extra:
            warnings.append(f"case {known.case}: predicted values {extra} are not among the labels and were not scored")
        rows += score_case(known.case, known.group, truth, found, grid, scored, tolerance_mm=tolerance_mm)
        if progress:
            progress(number, len(pairs))
    result = Evaluation(rows=tuple(rows), tolerance_mm=tolerance_mm, seed=seed, warnings=tuple(warnings))
    if output is not None:
        result.save(output)
    return result


def evaluate_predictor(
    predictor: Predictor,
    cases: Sequence[LabelledCase],
    *,
    ignore: int | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    seed: int = 0,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predicts every case as production does and scores it on the files' own grid, `ignore` as in `evaluate`; the
    predictions are written as `<case>_dseg.nii.gz` into the folder `keep` when one is given."""
    scored = segmentation_of(predictor).scored
    rows: list[Row] = []
    for number, known in enumerate(cases, start=1):
        sources = {role: open_source(path) for role, path in known.case.files.items()}
        found, _ = predict_labels(predictor, sources)
        truth, grid = read_labels(known.label)
        first = predictor.bundle.preprocessing.roles[0]
        check_grids(known.label, grid, known.case.files[first], sources[first].grid)
        if keep is not None:
            write_labels(kept_path(keep, known), found, sources[first], names=predictor.task.written_names)
        found = left_out(found, truth, ignore)
        rows += score_case(known.case.id, known.case.group, truth, found, grid, scored, tolerance_mm=tolerance_mm)
        if progress:
            progress(number, len(cases))
    return Evaluation(rows=tuple(rows), tolerance_mm=tolerance_mm, seed=seed)


def kept_path(folder: Path, known: LabelledCase) -> Path:
    """Where `evaluate_predictor` keeps the prediction of a case."""
    return folder / f"{known.case.id}_{SUFFIX}.nii.gz"


def evaluate_bundle(
    bundle: Bundle, cases: Sequence[LabelledCase], *, device: str = "auto", output: Path | None = None, **settings: Any
) -> Evaluation:
    """A bundle on a labelled cohort; `settings` as `evaluate_predictor`."""
    result = evaluate_predictor(Predictor.load(bundle, device=device), cases, **settings)
    if output is not None:
        result.save(output)
    return result


def score_case(
    case: str,
    group: str,
    truth: np.ndarray,
    found: np.ndarray,
    grid: Grid,
    scored: Scored,
    *,
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Row]:
    """Every label or region of one case; both arrays (*space) on `grid`."""
    return [
        Row(
            case=case,
            group=group,
            label=v,
            name=n,
            score=score(mask_of(truth, covered), mask_of(found, covered), grid, tolerance_mm=tolerance_mm),
        )
        for v, (n, covered) in scored.items()
    ]


def mask_of(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where labels (*space) hold one of the values."""
    mask: np.ndarray = np.logical_or.reduce([labels == value for value in values])
    return mask


def left_out(found: np.ndarray, truth: np.ndarray, ignore: int | None) -> np.ndarray:
    """The prediction without what it says where the reference holds the value `ignore`."""
    return found if ignore is None else np.where(truth == ignore, 0, found)


def check_grids(path: Path, grid: Grid, other_path: Path, other: Grid) -> None:
    """Raises GeometryError unless both lie in the same place: equal arrays on flipped grids are not equal."""
    if not grid.matches(other):
        raise GeometryError(
            f"{other_path} lies on another grid than {path}: shape {other.shape} spacing {rounded(other.spacing)} "
            f"affine {other.affine.tolist()}, against {grid.shape} {rounded(grid.spacing)} {grid.affine.tolist()}; "
            "resample one onto the other first"
        )


@dataclass(frozen=True, kw_only=True)
class Known:
    """A reference: its case, group, and the names a prediction of it may have."""

    case: str
    group: str
    names: tuple[str, ...]
    path: Path


def references(place: Path) -> list[Known]:
    """From a manifest, or a folder: its `*_dseg` files when there are any, else all. Raises ConfigError when none."""
    if place.is_dir() and not layout_of(place):
        files = find(place)
        files = [f for f in files if stem_of(f).endswith(f"_{SUFFIX}")] or files
        known = [Known(case=case_of(f), group=case_of(f), names=(case_of(f),), path=f) for f in files]
    else:
        rows = [r for r in read_rows(place) if r.get(LABEL) or r.get("split") != "test"]
        known = [_from_row(place, number, row) for number, row in enumerate(rows, start=1)]
    if not known:
        raise ConfigError(f"{place}: no reference label files (.nii, .nii.gz) there")
    return known


def _from_row(manifest: Path, number: int, row: Mapping[str, str]) -> Known:
    case = next((row[c] for c in ID_COLUMNS if row.get(c)), "")
    if not case or not row.get(LABEL):
        raise ConfigError(f"{manifest}: row {number} needs columns 'case' and 'label'; found {sorted(row)}")
    files = [Path(v) for k, v in row.items() if k != LABEL and v and suffix_of(Path(v))]
    names = (case, *(safe_id(stem_of(f)) for f in files))
    return Known(case=case, group=row.get("group") or case, names=names, path=manifest.parent / row[LABEL])


def match(known: Iterable[Known], prediction: Path) -> list[tuple[Known, Path, Path]]:
    """Each reference with its prediction file. Raises ConfigError listing what is missing or found twice."""
    places: dict[str, list[Path]] = {}
    for path in find(prediction):
        places.setdefault(case_of(path), []).append(path)
    pairs, faults = [], []
    for one in known:
        found = next((places[name] for name in one.names if name in places), [])
        if len(found) == 1:
            pairs.append((one, one.path, found[0]))
        else:
            faults.append(
                f"  {one.case}: " + (f"{len(found)} predictions {[str(f) for f in found]}" if found else "none")
            )
    if faults:
        raise ConfigError(
            f"{prediction}: {len(faults)} references without exactly one prediction\n" + "\n".join(faults)
        )
    return pairs


def case_of(path: Path) -> str:
    """Case id of a label file: `<case>_dseg.nii.gz`, `<case>.nii.gz`, or as a BIDS derivative is named."""
    return original(stem_of(path).removesuffix(f"_{SUFFIX}"))


def all_labels(paths: Iterable[Path]) -> dict[int, str]:
    """Every value above 0 in the files, with the name stored in one of them or the value as text."""
    values: set[int] = set()
    names: dict[int, str] = {}
    for path in paths:
        values |= set(np.unique(read_labels(path)[0]).tolist())
        names = label_names(path) | names
    return {v: names.get(v, str(v)) for v in sorted(values) if v > 0}


def format_table(result: Evaluation) -> str:
    """The summary as text: a line per label, n beside every mean."""
    lines = [f"{'label':<24}{'n':>4} {'TP/FP/FN/TN':>13}  {'Dice [95 %]':<22}{'NSD':>7}  {'HD95 mm [95 %]':<24}flagged"]
    for s in result.summary():
        kinds = "/".join(str(s[k]) for k in KINDS)
        lines.append(
            f"{s['name'][:23]:<24}{s['n']:>4} {kinds:>13}  {told(s['dice'], s['dice_95'], 3):<22}"
            f"{told(s['nsd'], None, 3):>7}  {told(s['hd95_mm'], s['hd95_mm_95'], 1):<24}{s['hd95_flagged']}"
        )
    lines.append(f"mean Dice over labels {told(result.mean(), None, 3)}; NSD at {result.tolerance_mm:g} mm")
    return "\n".join([*lines, *result.warnings])


def told(value: float | None, bounds: tuple[float, float] | None, digits: int) -> str:
    """`0.912 [0.90, 0.93]`, or `-` where undefined."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "")
