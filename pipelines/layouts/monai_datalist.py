"""MONAI's data list (also the dataset.json of the Medical Segmentation Decathlon): entries of image, label, fold.

An image may be a list, a file a channel; where several channels are named and an entry has one file, they are its
volumes (the 4D files of the Decathlon's brains and prostates).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmamba.formats.volume import volumes
from pipelines.cases.case import safe_id
from pipelines.cases.formats import parts_of, stem_of
from pipelines.layouts.dataset import Dataset, Row, read_json, with_folds

PARTS = {"training": "", "validation": "validation", "testing": "test", "test": "test", "datalist": ""}
PATIENT = ("group", "patient", "patient_id", "subject", "subject_id")


def knows(place: Path) -> bool:
    """A JSON file, or a folder with a dataset.json, that lists images."""
    return _entries(place) is not None


def read(place: Path) -> Dataset:
    """The data set of a list; paths count from its folder. `fold` k is held out in fold k; fold 0 is the split."""
    values, entries = _entries(place) or ({}, [])
    root = place if place.is_dir() else place.parent
    named = values.get("channel_names") or values.get("modality") or {}
    many = max((len(_listed(e.get("image"))) for _, e in entries), default=1)
    roles = tuple(str(v) for v in named.values()) if isinstance(named, dict) and len(named) == many else ()
    if isinstance(named, dict) and many == 1 < len(named):  # the Decathlon: the volumes of one file
        roles = tuple(str(v) for v in named.values())
        entries = [(part, {**e, "image": [*volumes(Path(_listed(e["image"])[0]), len(roles))]}) for part, e in entries]
    roles = roles or (("image",) if many == 1 else tuple(f"image_{i}" for i in range(many)))
    rows = tuple(_row(root, part, entry, roles) for part, entry in entries)
    held: dict[int, list[str]] = {}
    for (_, entry), row in zip(entries, rows, strict=True):
        if isinstance(entry.get("fold"), int) and row.get("split") != "test":
            held.setdefault(entry["fold"], []).append(row["case"])
    folds = tuple(tuple(held[k]) for k in sorted(held))
    labels = {int(k): str(v) for k, v in values.get("labels", {}).items() if str(k).isdigit() and int(k) > 0}
    return Dataset(rows=with_folds(rows, folds if len(folds) > 1 else ()), roles=roles, labels=labels, folds=folds)


def _entries(place: Path) -> tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]] | None:
    """The list's other values, and (part, entry) pairs; None when it is no list of images."""
    path = place / "dataset.json" if place.is_dir() else place
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    values = read_json(path)
    values = {"training": values} if isinstance(values, list) else values
    found = []
    for part in PARTS:
        for entry in values.get(part, []) if isinstance(values.get(part), list) else []:
            found.append((part, {"image": entry} if isinstance(entry, str) else entry))
    usable = bool(found) and all(isinstance(e, dict) and e.get("image") for _, e in found)
    return (values, found) if usable else None


def _row(root: Path, part: str, entry: Mapping[str, Any], roles: Sequence[str]) -> Row:
    images = _listed(entry["image"])
    first = Path(images[0])
    row = {"case": safe_id(str(entry.get("id") or entry.get("case") or stem_of(parts_of(first)[0])))}
    row |= {role: str(root / path) for role, path in zip(roles, images)}
    row |= {"label": str(root / str(entry["label"]))} if entry.get("label") else {}
    row |= {"split": PARTS[part]} if PARTS[part] else {}
    group = next((str(entry[k]) for k in PATIENT if entry.get(k)), "")
    return row | ({"group": group} if group else {}) | ({"site": str(entry["site"])} if entry.get("site") else {})


def _listed(image: Any) -> list[str]:
    return [str(i) for i in image] if isinstance(image, list) else [str(image)]
