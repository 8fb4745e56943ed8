"""A labelled cohort: manifest or data set -> cases, checked as a whole; split by group (patient), never by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.errors import ConfigError, MedMambaError
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source, read_labels
from pipelines.cases.manifest import ID_COLUMNS, read_rows

LABEL = "label"
SPLITS = ("train", "validation", "test")
SHOWN = 30  # faults listed before the rest is only counted


@dataclass(frozen=True, kw_only=True)
class LabelledCase:
    """A case with its label file and, when the manifest says so, the part it belongs to, the fold that holds it out
    and the site it comes from."""

    case: Case
    label: Path
    split: str = ""
    site: str = ""
    fold: str = ""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Cases to learn from and cases held out; no group stands in both."""

    train: tuple[LabelledCase, ...]
    validation: tuple[LabelledCase, ...]


def read(
    manifest: Path,
    roles: Sequence[str],
    *,
    labels: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LabelledCase, ...]:
    """Cases of a manifest with columns `case` (or `id`), one a role, `label`, optionally `group` (default: the case)
    and `split` (train, validation, test); paths count from its folder.

    Files are opened: grids of images and label must match and label values stand in `labels` (None: any).
    Raises ConfigError listing every fault.
    """
    found, faults = inspect(manifest, roles, labels=labels, progress=progress)
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        listed = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
        raise ConfigError(f"{manifest}: {len(faults)} faults\n{listed}{more}")
    return found


def inspect(
    manifest: Path,
    roles: Sequence[str],
    *,
    labels: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[LabelledCase, ...], list[str]]:
    """The cases of `read` that can be told, and every fault as a sentence."""
    rows = [r for r in read_rows(manifest, roles) if r.get(LABEL) or r.get("split") != "test"]  # an unlabelled test set
    faults: list[str] = []
    cases = [_case(manifest, number, row, roles, faults) for number, row in enumerate(rows, start=1)]
    found = [c for c in cases if c is not None]
    seen: dict[str, int] = {}
    for labelled in found:
        seen[labelled.case.id] = seen.get(labelled.case.id, 0) + 1
    faults += [f"case {name!r} stands {n} times; every id may stand once" for name, n in seen.items() if n > 1]
    for number, labelled in enumerate(found, start=1):
        faults += check_files(labelled, labels)
        if progress:
            progress(number, len(found))
    faults += split_faults(found)
    if not rows:
        faults.append("no case in it")
    return tuple(found), faults


def _case(
    manifest: Path, number: int, row: dict[str, str], roles: Sequence[str], faults: list[str]
) -> LabelledCase | None:
    """One row as a case; what is wrong with it goes to `faults`."""
    name = next((row[c] for c in ID_COLUMNS if row.get(c)), "")
    place = f"row {number} ({name or 'no id'})"
    lacking = [c for c in (*roles, LABEL) if not row.get(c)] + ([] if name else ["case"])
    if lacking:
        faults.append(f"{place}: columns {lacking} are missing or empty; the file has {sorted(row)}")
        return None
    split = row.get("split", "")
    if split and split not in SPLITS:
        faults.append(f"{place}: split {split!r} unknown; known: {', '.join(SPLITS)}")
    files = {role: manifest.parent / row[role] for role in roles}
    try:
        case = Case(id=name, files=files, group=row.get("group") or name)
    except ConfigError as error:
        faults.append(f"{place}: {error}")
        return None
    told = {name: row.get(name, "") for name in ("site", "fold")}
    return LabelledCase(case=case, label=manifest.parent / row[LABEL], split=split, **told)


def check_files(labelled: LabelledCase, labels: Sequence[int] | None) -> list[str]:
    """Faults of one case's files: unreadable, on different grids, label values that are not listed."""
    faults, name = [], labelled.case.id
    grids = {}
    for role, path in labelled.case.files.items():
        try:
            grids[role] = open_source(path).grid
        except MedMambaError as error:
            faults.append(f"case {name!r}: {error}")
    try:
        array, grid = read_labels(labelled.label)
    except MedMambaError as error:
        return [*faults, f"case {name!r}: {error}"]
    for role, other in grids.items():
        if not grid.matches(other):
            faults.append(
                f"case {name!r}: grids differ: label shape {grid.shape} spacing {rounded(grid.spacing)} origin "
                f"{rounded(grid.affine[:-1, -1])}, {role!r} {other.shape} {rounded(other.spacing)} "
                f"{rounded(other.affine[:-1, -1])}; resample the label onto the image"
            )
    unknown = sorted(set(np.unique(array).tolist()) - {0, *labels}) if labels is not None else []
    if unknown:
        faults.append(
            f"case {name!r}: {labelled.label} holds label values {unknown[:20]} that the run file does not list"
        )
    return faults


def rounded(values: Any) -> list[float]:
    """Numbers for a message."""
    return [round(float(v), 4) for v in values]


def split_faults(cases: Sequence[LabelledCase]) -> list[str]:
    """A split column must be filled for all or none, and keep every group in one part."""
    parts: dict[str, set[str]] = {}
    for c in cases:
        parts.setdefault(c.case.group, set()).add(c.split)
    torn = [f"group {g!r} stands in {sorted(p)}; a patient belongs to one part" for g, p in parts.items() if len(p) > 1]
    filled = {bool(c.split) for c in cases}
    return torn + (["the split column is filled for some cases only"] if len(filled) > 1 and not torn else [])


def split(cases: Sequence[LabelledCase], *, validation_share: float, seed: int) -> Split:
    """By the split column when there is one (test cases are left out), else whole groups drawn by `seed`.

    The share of groups is rounded, at least one when above 0. Raises ConfigError when nothing is left to learn from.
    """
    if any(c.split for c in cases):
        parts = Split(
            train=tuple(c for c in cases if c.split == "train"),
            validation=tuple(c for c in cases if c.split == "validation"),
        )
    else:
        groups = sorted({c.case.group for c in cases})
        count = max(1, round(validation_share * len(groups))) if validation_share > 0 else 0
        held = {groups[i] for i in np.random.default_rng(seed).permutation(len(groups))[:count]}
        parts = Split(
            train=tuple(c for c in cases if c.case.group not in held),
            validation=tuple(c for c in cases if c.case.group in held),
        )
    if not parts.train:
        raise ConfigError(f"{len(cases)} cases: none left to train on; add cases or lower validation_share")
    return parts
