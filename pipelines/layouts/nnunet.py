"""nnU-Net's raw layout: `dataset.json`, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, `splits_final.json`.

Results are named as nnU-Net names them, `CASE.nii.gz` in one folder. `imagesTs` given alone is its cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmamba.errors import ConfigError
from pipelines.cases.formats import spread
from pipelines.layouts.dataset import Dataset, Row, read_json, with_folds

PARTS = {"imagesTr": "Tr", "imagesTs": "Ts"}
PRODUCTS = "{id}{other}"


def knows(place: Path) -> bool:
    """A folder whose dataset.json names channels and a file ending, or the images' folder in it."""
    root = _root(place)
    if not (root / "dataset.json").is_file():
        return False
    values = read_json(root / "dataset.json")
    return isinstance(values, dict) and {"channel_names", "file_ending"} <= set(values)


def read(place: Path) -> Dataset:
    """The data set of a `DatasetXXX_Name` folder; the first saved fold is its split. Raises ConfigError."""
    parts = (PARTS[place.name],) if _root(place) != place else tuple(PARTS.values())
    place = _root(place)
    values = read_json(place / "dataset.json")
    roles = tuple(str(values["channel_names"][key]) for key in sorted(values["channel_names"], key=int))
    labels, regions, ignore = label_table(place, values)
    written = tuple(map(int, values["regions_class_order"])) if regions else ()
    folds = saved_folds(place)
    rows = with_folds(tuple(row for part in parts for row in _rows(place, part, values, roles)), folds)
    return Dataset(rows=rows, roles=roles, labels=labels, regions=regions, written=written, ignore=ignore, folds=folds)


def _root(place: Path) -> Path:
    """The data set's folder, of which `place` may be the part with images."""
    return place.parent if place.name in PARTS and not (place / "dataset.json").exists() else place


def label_table(
    place: Path, values: Mapping[str, Any]
) -> tuple[dict[int, str], dict[str, tuple[int, ...]], int | None]:
    """Names by value, regions by name in the order that `regions_class_order` counts, and the ignored value."""
    table = dict(values.get("labels", {}))
    ignore = table.pop("ignore", None)
    table.pop("background", None)
    regions = {name: tuple(int(v) for v in found) for name, found in table.items() if isinstance(found, list)}
    if regions:
        order = values.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(table):
            raise ConfigError(f"{place / 'dataset.json'}: {len(table)} regions need a regions_class_order as long")
        regions = {name: regions.get(name, (found,)) for name, found in table.items() if found != 0}
    names = {int(v): name for name, v in table.items() if not isinstance(v, list) and int(v) != 0}
    for name, covered in regions.items():
        names |= {v: names.get(v, f"{name} ({v})") for v in covered}
    return dict(sorted(names.items())), regions, None if ignore is None else int(ignore)


def saved_folds(place: Path) -> tuple[tuple[str, ...], ...]:
    """Ids held out in each fold of `splits_final.json`, in the folder itself or in the preprocessed one beside it."""
    tree = place.parent.parent / "nnUNet_preprocessed" / place.name
    path = next((p / "splits_final.json" for p in (place, tree) if (p / "splits_final.json").is_file()), None)
    return () if path is None else tuple(tuple(str(c) for c in fold["val"]) for fold in read_json(path))


def _rows(place: Path, part: str, values: Mapping[str, Any], roles: tuple[str, ...]) -> tuple[Row, ...]:
    """Cases of `imagesTr` or `imagesTs`, or those that dataset.json lists file by file."""
    ending, rows = str(values["file_ending"]), {}
    if part == "Tr" and isinstance(values.get("dataset"), dict):
        for case, files in values["dataset"].items():
            images = {role: str((place / f).resolve()) for role, f in zip(roles, files["images"])}
            label = str((place / files["label"]).resolve())
            rows[case] = {"case": case, "products": PRODUCTS, **images, "label": label}
        return tuple(rows.values())
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    folder, labels = (place / f"{kind}{part}" for kind in ("images", "labels"))
    for path in sorted(folder.glob(f"*{ending}")) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and int(match[2]) < len(roles):
            test = {"split": "test"} if part == "Ts" else {}
            row = rows.setdefault(match[1], {"case": match[1], "products": PRODUCTS} | test)
            row[roles[int(match[2])]] = str(path)
    for case, row in rows.items():
        row |= {role: str(path) for role, path in spread({r: Path(row[r]) for r in roles if r in row}, roles).items()}
        if (labels / f"{case}{ending}").is_file() or part == "Tr":
            row["label"] = str(labels / f"{case}{ending}")
    return tuple(rows.values())
