"""What is wrong with a change data set, before a training run finds out: `medmamba check DATASET`.

A fault spoils training or scores; a note is told because it is easy to overlook.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from medmamba.errors import InputError
from pipelines.layouts.change import ChangeSet, PairRow
from pipelines.layouts.change_labels import IGNORED, read_pixels

SHOWN = 5  # examples told of every finding

FINDINGS = {
    "missing_file": "a file of the pair does not exist",
    "corrupt_file": "a picture cannot be decoded whole",
    "mixed_encoding": "some labels are colours and others ids",
    "unknown_label": "colours or values that are no class",
    "label_255": "ids hold 255; it is left out of losses and scores, never a class",
    "wrong_size": "dates and labels of a pair differ in size",
    "identical_dates": "both dates are the same picture",
    "swapped_dates": "the earlier picture of one pair is the later one of another",
    "leak": "the same picture stands in two splits",
    "scene_leak": "crops of one scene stand in two splits",
    "duplicate": "the same pair stands twice in a split",
    "dates_disagree": "a pixel has a class at one date only",
    "mask_disagrees": "the mask of change and the classes say different things",
}
NOTES = frozenset({"label_255", "duplicate", "scene_leak"})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of trouble, a code of FINDINGS: in how many pairs, and the first of them with what was seen."""

    code: str
    count: int
    examples: tuple[str, ...]

    @property
    def fault(self) -> bool:
        return self.code not in NOTES

    def describe(self) -> str:
        more = f"; and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        kind = "fault" if self.fault else "note"
        return f"{kind} {self.code} ({FINDINGS[self.code]}): {self.count}: {'; '.join(self.examples)}{more}"


@dataclass
class Seen:
    """What was seen so far: findings by code, and pairs by the content of their pictures."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    before: dict[bytes, list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    after: dict[bytes, list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    encodings: dict[bool, list[str]] = field(default_factory=lambda: defaultdict(list))


def check(dataset: ChangeSet, *, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Every finding in a data set, all files read; faults first."""
    seen = Seen()
    for number, row in enumerate(dataset.rows, start=1):
        check_pair(dataset, row, seen)
        if progress:
            progress(number, len(dataset.rows))
    check_encodings(seen)
    check_copies(seen)
    check_scenes(dataset, seen)
    findings = [
        Finding(code=code, count=len(said), examples=tuple(said[:SHOWN])) for code, said in seen.found.items() if said
    ]
    return sorted(findings, key=lambda finding: (not finding.fault, list(FINDINGS).index(finding.code)))


def check_pair(dataset: ChangeSet, row: PairRow, seen: Seen) -> None:
    """Files, sizes and labels of one pair; notes the content of its pictures."""
    pixels: dict[str, np.ndarray] = {}
    for role, path in row.files.items():
        try:
            pixels[role] = read_pixels(path)
        except InputError as error:
            seen.found[error.code].append(str(error))
    sizes = {role: array.shape[:2] for role, array in pixels.items()}
    if len(set(sizes.values())) > 1:
        seen.found["wrong_size"].append(f"{row.id}: {sizes}")
    for role, place in (("before", seen.before), ("after", seen.after)):
        if role in pixels:
            place[content(pixels[role])].append(row)
    for role in ("earlier", "later"):
        if role in pixels:
            seen.encodings[pixels[role].ndim == 3].append(f"{row.files[role]}")
    if len(pixels) == len(row.files) and len(set(sizes.values())) == 1:
        check_labels(dataset, row, seen)


def check_labels(dataset: ChangeSet, row: PairRow, seen: Seen) -> None:
    """Classes and masks of one whole pair."""
    try:
        change, *dates = dataset.labels(row)
    except InputError as error:
        seen.found["unknown_label"].append(str(error))
        return
    if not dates:
        return
    for ids in dates:
        if (ignored := int((ids == IGNORED).sum())) > 0:
            seen.found["label_255"].append(f"{row.id}: {ignored} pixels")
            break
    labelled = np.all([ids != IGNORED for ids in dates], axis=0)
    apart = int(((dates[0] > 0) != (dates[1] > 0))[labelled].sum())
    if apart:
        seen.found["dates_disagree"].append(f"{row.id}: {apart} pixels")
    wrong = int((change != ((dates[0] > 0) | (dates[1] > 0)))[labelled].sum())
    if wrong:
        seen.found["mask_disagrees"].append(f"{row.id}: {wrong} pixels")


def check_encodings(seen: Seen) -> None:
    """The rarer way of writing labels is the fault."""
    if len(seen.encodings) == 2:
        rare = min(seen.encodings.values(), key=len)
        seen.found["mixed_encoding"] += rare
        ids = set(rare)
        seen.found["unknown_label"] = [s for s in seen.found["unknown_label"] if s.partition(":")[0] not in ids]


def check_copies(seen: Seen) -> None:
    """Pictures that stand where they should not: at both dates, at the other date of another pair, in two splits."""
    for key, rows in seen.before.items():
        others = seen.after.get(key, [])
        for row in rows:
            if row in others:
                seen.found["identical_dates"].append(row.id)
            elif others:
                seen.found["swapped_dates"].append(f"{row.id} (before) is {others[0].id} (after)")
    for rows in (*seen.before.values(), *seen.after.values()):
        if len({row.split for row in rows}) > 1:
            seen.found["leak"].append(" = ".join(f"{row.id} ({row.split or 'no split'})" for row in rows[:3]))
    for rows in repeated(seen):
        seen.found["duplicate"].append(" = ".join(row.id for row in rows[:3]))


def repeated(seen: Seen) -> Iterator[list[PairRow]]:
    """Pairs of one split whose two pictures are the same as those of another pair."""
    later = {id(row): key for key, rows in seen.after.items() for row in rows}
    for rows in seen.before.values():
        same: dict[tuple[str, bytes | None], list[PairRow]] = defaultdict(list)
        for row in rows:
            same[row.split, later.get(id(row))].append(row)
        yield from (copies for copies in same.values() if len(copies) > 1)


def check_scenes(dataset: ChangeSet, seen: Seen) -> None:
    """Crops of one scene belong to one split."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in dataset.rows:
        splits[row.group].add(row.split)
    seen.found["scene_leak"] += [f"{scene} in {sorted(parts)}" for scene, parts in splits.items() if len(parts) > 1]


def content(pixels: np.ndarray) -> bytes:
    """A digest of a picture's pixels: another file format or compression gives the same."""
    head = f"{pixels.shape} {pixels.dtype}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()
