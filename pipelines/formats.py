"""The tables of readers joined: which file is opened by whom."""

from __future__ import annotations

from pathlib import Path

from medmamba.errors import InputError
from medmamba.formats.nifti import SUFFIXES, NiftiSource

READERS = dict.fromkeys((*SUFFIXES, ".hdr", ".img"), NiftiSource)


def suffix_of(path: Path) -> str | None:
    """The known suffix of a file (longest first, case ignored), or None."""
    name = path.name.lower()
    return next((s for s in sorted(READERS, key=len, reverse=True) if name.endswith(s)), None)


def open_source(path: Path) -> NiftiSource:
    """A Source for `path`: grid at once, values lazily. Raises InputError("unsupported_format")."""
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(
            "unsupported_format", f"{path}: no reader for this suffix; known: {', '.join(sorted(READERS))}"
        )
    return READERS[suffix](path)


def stem_of(path: Path) -> str:
    """The file name without its known suffix; the whole name when the suffix is unknown."""
    return path.name[: len(path.name) - len(suffix_of(path) or "")]
