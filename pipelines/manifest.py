"""Cases from a CSV table: a column `case` (or `id`), one column per role, optionally `group` and `date`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from medmamba.errors import ConfigError
from pipelines.case import Case, safe_id

NAMES = ("case", "id")
OTHER = ("group", "date")


def read_manifest(path: Path, roles: Sequence[str]) -> tuple[list[Case], list[str]]:
    """Cases with paths made absolute from the table's own folder, and the columns that were not used.

    An empty cell is a role the case lacks; whether files exist is not asked here. Comma, semicolon and tab are known.
    Raises ConfigError that lists all faults at once.
    """
    header, rows = _table(path)
    name = next((n for n in NAMES if n in header), None)
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
            cases[identity] = Case(id=identity, files=files, group=row.get("group", ""), dates=dates)
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults) + ". Correct the table")
    return list(cases.values()), [c for c in header if c not in (*used, *OTHER, name)]


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names and (line number, row) pairs, cells stripped, empty lines left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error}); expected CSV in UTF-8") from None
    first = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count), restkey="", strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        rows = [(reader.line_num, {k: (v or "").strip() for k, v in row.items() if k}) for row in reader]
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: {error}; expected CSV") from None
    return header, [(number, row) for number, row in rows if any(row.values())]
