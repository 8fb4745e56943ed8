"""What one result is made from, and the code words that are safe as file names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medmamba.errors import ConfigError

SAFE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")


@dataclass(frozen=True, kw_only=True)
class Case:
    """`id` unique in a run, safe as a file name; `files` by role; `group` patient or scene; `dates` (ISO) by role."""

    id: str
    files: Mapping[str, Path]
    group: str = ""
    dates: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not SAFE.fullmatch(self.id) or len(self.id) > 180:
            raise ConfigError(f"case id {self.id!r} is not safe as a file name; use letters, digits, '.', '_' and '-'")
        if not self.files:
            raise ConfigError(f"case {self.id!r} has no files")


def safe_id(text: str) -> str:
    """`text` (a relative path without its suffix) as a case id: folders joined by '__', other signs as '-'."""
    joined = "__".join(part for part in re.split(r"[/\\]", text) if part not in ("", "."))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", joined)[:160].strip("._-") or "case"
