"""BIDS: images by suffix and entities, labels from `derivatives`, site from participants.tsv; and our own products
named and described as a derivative data set: `sub-01/ses-2/anat/sub-01_ses-2_space-orig_desc-<bundle>_dseg.nii.gz`."""

from __future__ import annotations

import colorsys
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medmamba.files import write_bytes, write_json
from pipelines.cases.case import safe_id
from pipelines.cases.walk import is_product
from pipelines.layouts.dataset import Dataset, Row, read_json

BIDS_VERSION = "1.10.0"
ENDINGS = (".nii.gz", ".nii")
DERIVED = ("space", "desc", "label", "res", "den", "seg", "atlas")  # entities that a derivative may add
LABEL_SUFFIXES = ("dseg", "mask")
NOT_BIDS = ("report.html", "set_aside/", "**/*.png", "**/*_dseg.dcm", "**/*_disagreement.nii.gz")  # beside it, ours


def knows(place: Path) -> bool:
    """A folder with a dataset_description.json that names a BIDS version."""
    path = place / "dataset_description.json"
    return path.is_file() and "BIDSVersion" in read_json(path)


def read(place: Path) -> Dataset:
    """Every image below `sub-*`: the case is its entities, the role its suffix (T1w, FLAIR, ct), the group its subject.

    A label is the `_dseg` (or `_mask`) of a derivative with the same entities, but for those a derivative adds; never
    one that we predicted."""
    rows: dict[str, Row] = {}
    roles: list[str] = []
    for path in _files(place, "sub-*"):
        entities, suffix = parse(path)
        if "sub" not in entities or suffix in LABEL_SUFFIXES:
            continue
        case = _name(entities)
        folder = [safe_id(part) for part in path.parent.relative_to(place).parts]
        products = "/".join([*folder, f"{safe_id(case)}_space-orig_desc-{{maker}}_{{suffix}}"])
        row = rows.setdefault(case, {"case": case, "group": f"sub-{entities['sub']}", "products": products})
        row[suffix] = str(path)
        roles += [suffix] if suffix not in roles else []
    sites = participants(place)
    labels: dict[int, str] = {}
    for path in _files(place / "derivatives", "*"):
        entities, suffix = parse(path)
        case = _name({k: v for k, v in entities.items() if k not in DERIVED})
        wanted = suffix in LABEL_SUFFIXES and case in rows and (suffix == "dseg" or "label" not in rows[case])
        if wanted and not is_product(path):
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


def original(stem: str) -> str:
    """The entities of the image behind a derivative: sub-01_space-orig_desc-x -> sub-01; other names as they are."""
    pairs = [pair for pair in stem.split("_") if pair.partition("-")[0] not in DERIVED]
    return "_".join(pairs) if stem.startswith("sub-") else stem


def source_uri(path: Path, products: str) -> dict[str, str]:
    """{"uri": what a derivative calls an input of its case}; {} for a case that no BIDS data set names."""
    depth = products.count("/")
    return {"uri": "bids:raw:" + "/".join(path.parts[-depth - 1 :])} if depth else {}


def describe(folder: Path, *, bundle: str, source: Path, names: dict[int, str]) -> None:
    """Makes a folder of products a BIDS derivative of what lies in `source`: `dataset_description.json`, `dseg.tsv`
    (index, name, colour); for a BIDS data set also the way back to it, and `.bidsignore` for what is ours alone."""
    values: dict[str, Any] = {
        "Name": f"Segmentations by {bundle}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "medmamba", "Version": version("medmamba"), "Description": f"bundle {bundle}"}],
        "SourceDatasets": [{"URL": source.resolve().as_uri()}],
    }
    if source.is_dir() and knows(source):
        values["DatasetLinks"] = {"raw": Path(os.path.relpath(source.resolve(), folder.resolve())).as_posix()}
        write_bytes(folder / ".bidsignore", "".join(f"{line}\n" for line in NOT_BIDS).encode())
    write_json(folder / "dataset_description.json", values)
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
