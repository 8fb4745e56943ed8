"""BIDS: images by suffix and entities, labels from `derivatives`, site from participants.tsv; and our own products
described as a derivative data set."""

from __future__ import annotations

import colorsys
from importlib.metadata import version
from pathlib import Path

from medmamba.files import write_bytes, write_json
from pipelines.layouts.dataset import Dataset, Row, read_json

BIDS_VERSION = "1.10.0"
ENDINGS = (".nii.gz", ".nii")
DERIVED = ("space", "desc", "label", "res", "den", "seg", "atlas")  # entities that a derivative may add
LABEL_SUFFIXES = ("dseg", "mask")


def knows(place: Path) -> bool:
    """A folder with a dataset_description.json that names a BIDS version."""
    path = place / "dataset_description.json"
    return path.is_file() and "BIDSVersion" in read_json(path)


def read(place: Path) -> Dataset:
    """Every image below `sub-*`: the case is its entities, the role its suffix (T1w, FLAIR, ct), the group its subject.

    A label is the `_dseg` (or `_mask`) of a derivative with the same entities, but for those a derivative adds."""
    rows: dict[str, Row] = {}
    roles: list[str] = []
    for path in _files(place, "sub-*"):
        entities, suffix = parse(path)
        if "sub" not in entities or suffix in LABEL_SUFFIXES:
            continue
        case = _name(entities)
        row = rows.setdefault(case, {"case": case, "group": f"sub-{entities['sub']}"})
        row[suffix] = str(path)
        roles += [suffix] if suffix not in roles else []
    sites = participants(place)
    labels: dict[int, str] = {}
    for path in _files(place / "derivatives", "*"):
        entities, suffix = parse(path)
        case = _name({k: v for k, v in entities.items() if k not in DERIVED})
        if suffix in LABEL_SUFFIXES and case in rows and (suffix == "dseg" or "label" not in rows[case]):
            rows[case]["label"] = str(path)
            labels |= names_beside(path)
    for row in rows.values():
        row |= {"site": sites[row["group"]]} if row["group"] in sites else {}
    return Dataset(rows=tuple(rows.values()), roles=tuple(roles), labels=dict(sorted(labels.items())))


def parse(path: Path) -> tuple[dict[str, str], str]:
    """Entities and suffix of a file name: sub-01_ses-2_T1w.nii.gz -> {"sub": "01", "ses": "2"}, "T1w"."""
    stem = next(path.name[: -len(e)] for e in ENDINGS if path.name.endswith(e))
    *pairs, suffix = stem.split("_")
    return dict(pair.split("-", 1) for pair in pairs if "-" in pair), suffix


def participants(place: Path) -> dict[str, str]:
    """Site by participant, where participants.tsv has a column of that name."""
    path = place / "participants.tsv"
    if not path.is_file():
        return {}
    header, *lines = (line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if not {"participant_id", "site"} <= set(header):
        return {}
    rows = [dict(zip(header, line)) for line in lines]
    return {r["participant_id"]: r["site"] for r in rows if r.get("site", "n/a") != "n/a"}


def names_beside(path: Path) -> dict[int, str]:
    """Index -> name from the `_dseg.tsv` beside a label file, or the one at the root of its derivative."""
    stem = next(path.name[: -len(e)] for e in ENDINGS if path.name.endswith(e))
    places = [path.with_name(f"{stem}.tsv"), *(parent / "dseg.tsv" for parent in path.parents[:4])]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        return {}
    header, *lines = (line.split("\t") for line in found.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    rows = [dict(zip(header, line)) for line in lines]
    return {int(r["index"]): r["name"] for r in rows if int(r["index"]) > 0}


def describe(folder: Path, *, bundle: str, source: str, names: dict[int, str]) -> None:
    """Makes a folder of products a BIDS derivative: `dataset_description.json`, `dseg.tsv` (index, name, colour)."""
    write_json(
        folder / "dataset_description.json",
        {
            "Name": f"Segmentations by {bundle}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "medmamba", "Version": version("medmamba"), "Description": f"bundle {bundle}"}],
            "SourceDatasets": [{"URL": source}],
        },
    )
    lines = ["index\tname\tcolor", *(f"{value}\t{_cell(name)}\t{colour(value)}" for value, name in names.items())]
    write_bytes(folder / "dseg.tsv", ("\n".join(lines) + "\n").encode())


def colour(value: int) -> str:
    """A colour for a label value, always the same: hues apart by the golden ratio; background is black."""
    if value == 0:
        return "#000000"
    parts = colorsys.hsv_to_rgb(value * 0.618034 % 1, 0.65, 0.95)
    return "#" + "".join(f"{round(255 * p):02x}" for p in parts)


def _files(place: Path, first: str) -> list[Path]:
    found = (p for folder in sorted(place.glob(first)) for p in sorted(folder.rglob("*")))
    return [p for p in found if p.name.endswith(ENDINGS) and not p.name.startswith(".")]


def _name(entities: dict[str, str]) -> str:
    return "_".join(f"{k}-{v}" for k, v in entities.items())


def _cell(text: str) -> str:
    return " ".join(text.split())
