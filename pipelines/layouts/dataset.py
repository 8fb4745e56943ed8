"""A data set as its users keep it, seen as the rows of a manifest; nothing is moved, renamed or converted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmamba.errors import ConfigError

Row = dict[str, str]
FIXED = ("case", "label", "group", "site", "split", "fold", "date", "products")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`rows`: `case`, `group`, `split`, `site`, `label` and a column for each of `roles`, paths absolute; `products`
    how users of the layout expect results to be named (`Case.products`).

    `labels` value -> name as the user counts them (gaps allowed), `regions` name -> values where labels overlap, and
    the value that each region is `written` as, `ignore` the value that was not annotated, `folds` the ids held out in
    each saved fold."""

    rows: tuple[Row, ...]
    roles: tuple[str, ...]
    labels: Mapping[int, str] = field(default_factory=dict)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    written: tuple[int, ...] = ()
    ignore: int | None = None
    folds: tuple[tuple[str, ...], ...] = ()

    def for_roles(self, wanted: Sequence[str]) -> list[Row]:
        """Rows with their columns renamed to a bundle's roles: by name (case ignored, T1w is t1), else by number when
        no name fits. Raises ConfigError when neither fits."""
        known = {plain(role): role for role in self.roles}
        names = {role: known[plain(role)] for role in wanted if plain(role) in known}
        if not names and len(wanted) == len(self.roles):
            names = dict(zip(wanted, self.roles, strict=True))
        if not names:
            raise ConfigError(f"the data set has the channels {list(self.roles)}, the bundle wants {list(wanted)}")
        fixed = [{k: v for k, v in row.items() if k in FIXED} for row in self.rows]
        return [
            {**kept, **{role: row[name] for role, name in names.items() if row.get(name)}}
            for kept, row in zip(fixed, self.rows, strict=True)
        ]


def plain(role: str) -> str:
    """A channel's name without case and without BIDS's w for "weighted"."""
    return re.sub(r"(?<=\d)w$", "", role.casefold())


def with_folds(rows: Sequence[Row], folds: Sequence[Sequence[str]]) -> tuple[Row, ...]:
    """The rows with the `fold` that holds each out, and a `split`: `validation` for fold 0, `train` for the others.
    Test cases stay; without folds all rows as they are."""
    number = {case: str(k) for k, held in enumerate(folds) for case in held}
    split = {row["case"]: "validation" if number.get(row["case"]) == "0" else "train" for row in rows}
    return tuple(
        row
        if row.get("split") == "test" or not folds
        else {**row, "fold": number.get(row["case"], ""), "split": split[row["case"]]}
        for row in rows
    )


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises ConfigError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
