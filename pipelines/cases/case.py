"""What one result is made from, and the code words that are safe as file names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medmamba.errors import ConfigError

PRODUCTS = "{id}_{suffix}"
SAFE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")


@dataclass(frozen=True, kw_only=True)
class Case:
    """`id` unique in a run, safe as a file name; `files` by role; `group` patient or scene; `dates` (ISO) by role;
    `products` how the files made of it are named (see `product_name`)."""

    id: str
    files: Mapping[str, Path]
    group: str = ""
    dates: Mapping[str, str] = field(default_factory=dict)
    products: str = PRODUCTS

    def __post_init__(self) -> None:
        if not SAFE.fullmatch(self.id) or len(self.id) > 180:
            raise ConfigError(f"case id {self.id!r} is not safe as a file name; use letters, digits, '.', '_' and '-'")
        if not self.files:
            raise ConfigError(f"case {self.id!r} has no files")
        if not all(SAFE.fullmatch(part) for part in self.product_name("x", maker="x").split("/")):
            raise ConfigError(f"case {self.id!r}: products {self.products!r} are not safe as file names")

    def product_name(self, suffix: str, *, maker: str, main: bool = True) -> str:
        """Folders and name, without ending, of a product. In `products` stand for the reader of an input's layout:
        `{id}`, `{maker}` (letters and digits of the bundle's name), `{suffix}` what the file holds, and `{other}`, "_"
        and suffix of what is not the `main` product."""
        plain = re.sub(r"[^A-Za-z0-9]", "", maker)
        return self.products.format(id=self.id, maker=plain, suffix=suffix, other="" if main else f"_{suffix}")


def safe_id(text: str) -> str:
    """`text` (a relative path without its suffix) as a case id: folders joined by '__', other signs as '-'."""
    joined = "__".join(part for part in re.split(r"[/\\]", text) if part not in ("", "."))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", joined)[:160].strip("._-") or "case"
