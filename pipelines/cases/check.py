"""Every fault of a labelled data set at once, before a training finds them one by one: `medmamba check DATASET`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medmamba.errors import ConfigError
from pipelines.cases.cohort import LabelledCase, inspect
from pipelines.cases.contents import content_hash
from pipelines.cases.manifest import read_dataset, roles_of


def check_dataset(place: Path, progress: Callable[[int, int], None] | None = None) -> tuple[int, list[str]]:
    """How many cases a table or data set holds, and its faults as sentences: files that cannot be read, grids of image
    and label that differ, label values that are not listed, the same contents twice, patients in two parts."""
    dataset = read_dataset(place)
    roles = roles_of(place)
    if not roles:
        raise ConfigError(f"{place}: no column of images; a table has a column for each channel beside case and label")
    listed = None
    if dataset is not None and dataset.labels:
        listed = (*dataset.labels, *(() if dataset.ignore is None else (dataset.ignore,)))
    cases, faults = inspect(place, roles, labels=listed, progress=progress)
    faults += duplicates(cases)
    if dataset is not None:
        faults += torn_folds(cases, dataset.folds)
    return len(cases), faults


def duplicates(cases: Sequence[LabelledCase]) -> list[str]:
    """Images whose contents are those of another case; across two parts that is a leak. Labels may be alike (empty)."""
    seen: dict[tuple[str, str], LabelledCase] = {}
    faults = []
    for case in cases:
        for role, path in case.case.files.items():
            try:
                other = seen.setdefault((role, content_hash(path)), case)
            except OSError:  # told as a fault of its file
                continue
            if other is case:
                continue
            parts = {case.split, other.split} - {""}
            leak = f"; they stand in {sorted(parts)}: a leak" if len(parts) > 1 else ""
            patients = "" if case.case.group == other.case.group else " of two patients"
            faults.append(f"cases {other.case.id!r} and {case.case.id!r}{patients} have the same {role!r} image{leak}")
    return faults


def torn_folds(cases: Sequence[LabelledCase], folds: Sequence[Sequence[str]]) -> list[str]:
    """Patients that a saved fold learns from and is tested on, and cases that a fold names but nobody has."""
    groups = {c.case.id: c.case.group for c in cases if c.split != "test"}
    faults = []
    for number, held in enumerate(folds):
        inside = {groups[c] for c in held if c in groups}
        outside = {g for c, g in groups.items() if c not in held}
        faults += [f"fold {number}: patient {g!r} stands on both sides" for g in sorted(inside & outside)]
        faults += [f"fold {number}: case {c!r} is not in the data set" for c in held if c not in groups]
    return faults
