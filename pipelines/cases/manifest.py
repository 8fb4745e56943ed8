"""Rows of cases, however their owner keeps them: a table (CSV, TSV, JSON), or a data set in a layout we know.

The one reader of manifests: the batch makes cases of the rows, a cohort labelled cases, an evaluation references.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmamba.errors import ConfigError
from pipelines.cases.case import Case, safe_id
from pipelines.layouts import bids, monai_datalist, nnunet
from pipelines.layouts.dataset import Dataset, Row

ID_COLUMNS = ("case", "id")
OTHER = ("group", "date", "site", "split", "fold", "label")
LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Dataset]]] = {
    "nnU-Net": (nnunet.knows, nnunet.read),
    "BIDS": (bids.knows, bids.read),
    "MONAI data list": (monai_datalist.knows, monai_datalist.read),
}


def layout_of(place: Path) -> str | None:
    """The name of the layout that a folder or file is in, or None."""
    try:
        return next((name for name, (knows, _) in LAYOUTS.items() if knows(place)), None)
    except OSError:  # may not be listed: whoever reads it says so
        return None


def read_dataset(place: Path) -> Dataset | None:
    """The data set of a folder or list in a layout we know, else None. Raises ConfigError for one that is damaged."""
    name = layout_of(place)
    return None if name is None else LAYOUTS[name][1](place.absolute())


def read_rows(place: Path, roles: Sequence[str] | None = None) -> list[Row]:
    """Rows of a table, or of a data set with its columns named by `roles`; cells are text without blanks around them.

    Raises ConfigError."""
    dataset = read_dataset(place)
    if dataset is None:
        return [row for _, row in read_table(place)[1]]
    return dataset.for_roles(dataset.roles if roles is None else roles)


def roles_of(place: Path) -> tuple[str, ...]:
    """The channels that a data set names, or the columns of a table that are none of the known others."""
    dataset = read_dataset(place)
    if dataset is not None:
        return dataset.roles
    return tuple(column for column in read_table(place)[0] if column not in (*ID_COLUMNS, *OTHER))


def read_manifest(path: Path, roles: Sequence[str]) -> tuple[list[Case], list[str]]:
    """Cases with paths made absolute from the table's own folder, and the columns that were not used.

    An empty cell is a role the case lacks; whether files exist is not asked here. Raises ConfigError that lists all
    faults at once.
    """
    dataset = read_dataset(path)
    if dataset is not None:
        header, rows = [ID_COLUMNS[0], *roles], list(enumerate(dataset.for_roles(roles), start=1))
        rows = [(number, row) for number, row in rows if any(row.get(role) for role in roles)]
    else:
        header, rows = read_table(path)
    name = next((n for n in ID_COLUMNS if n in header), None)
    used = [r for r in roles if r in header]
    if name is None or not used:
        raise ConfigError(
            f"{path}: columns {header}; expected 'case' (or 'id') and at least one of the bundle's roles {list(roles)}"
        )
    faults: list[str] = []
    cases: dict[str, Case] = {}
    for number, row in rows:
        files = {role: path.parent / row[role] for role in used if row.get(role)}
        label = row.get(name, "")
        identity = safe_id(label).strip("._-") or "case"
        if not label:
            faults.append(f"line {number}: no {name}")
        elif not files:
            faults.append(f"line {number}: case {label!r} names no file")
        elif identity in cases:
            faults.append(f"line {number}: case {label!r} (written {identity!r}) stands there twice")
        else:
            dates = {role: row["date"] for role in files if row.get("date")}
            named = {"products": row["products"]} if dataset is not None and "products" in row else {}
            cases[identity] = Case(id=identity, files=files, group=row.get("group", ""), dates=dates, **named)
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults) + ". Correct the table")
    return list(cases.values()), [c for c in header if c not in (*used, *OTHER, name)]


def read_table(path: Path) -> tuple[list[str], list[tuple[int, Row]]]:
    """Column names and (line number, row) pairs of a CSV or TSV with a header (comma, semicolon or tab), or of a JSON
    list of objects (also below "cases"); empty lines left out. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error}); expected CSV in UTF-8") from None
    header, rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text)
    cells = [(n, {str(k).strip(): str(v or "").strip() for k, v in row.items() if k}) for n, row in rows]
    return header, [(number, row) for number, row in cells if any(row.values())]


def _csv_rows(path: Path, text: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    first = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count), restkey="", strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        return header, [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: {error}; expected CSV") from None


def _json_rows(path: Path, text: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a JSON list of rows") from None
    values = values.get("cases") if isinstance(values, dict) else values
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise ConfigError(f"{path}: expected rows with named columns")
    return list(dict.fromkeys(str(k) for row in values for k in row)), list(enumerate(values, start=1))
