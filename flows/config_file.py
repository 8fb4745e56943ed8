"""`--config FILE.toml` of every command: the file holds the names of its flags, flags on the command line win."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the entries of the file the defaults of the command; they mean what they would mean as flags."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: not readable as TOML: {error}") from None
    known = [str(p.name) for p in context.command.params if p.name != "config"]
    entries = {key.replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(set(entries) - set(known)):
        raise typer.BadParameter(f"{path}: {context.command.name} has no option {unknown}; known: {', '.join(known)}")
    context.default_map = entries
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=from_file, help="TOML with any of these options; flags win."),
]
