"""The tables of readers joined: which file is opened by whom, and which files hold one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmamba.errors import InputError
from medmamba.formats import FORMATS, Format
from medmamba.formats.volume import VolumeSource, is_volume, volumes
from medmamba.grid import Grid
from medmamba.source import FileSource, whole_labels

READERS: dict[str, Format] = {suffix: reader for reader in FORMATS.values() for suffix in reader.suffixes}
LONGEST_FIRST = sorted(READERS, key=len, reverse=True)
KNOWING = tuple(reader for reader in FORMATS.values() if reader.knows)


def suffix_of(path: Path) -> str | None:
    """The known suffix of a file (longest first, case ignored), or None."""
    name = path.name.lower()
    return next((s for s in LONGEST_FIRST if name.endswith(s) and name != s), None)


def knows(path: Path) -> Format | None:
    """The format that knows a file by its first bytes, whatever its name."""
    return next((reader for reader in KNOWING if reader.knows and reader.knows(path)), None)


def reader_of(path: Path) -> Format | None:
    """By suffix, else by the first bytes; a folder is read by whoever knows one of the files in it."""
    return (None if path.is_dir() else READERS.get(suffix_of(path) or "")) or knows(path)


def open_source(path: Path) -> FileSource:
    """A Source for `path` (or one volume of it, `FILE/volume=N`): grid at once, values lazily. Raises InputError;
    `unsupported_format` names what is known."""
    if is_volume(path):
        return VolumeSource(path, open_source(path.parent))
    reader = reader_of(path)
    if reader is None:
        known = "; ".join(f"{r.title} ({', '.join(r.suffixes)})" for r in FORMATS.values())
        what = "folder without a known image" if path.is_dir() else "file of a kind that no reader knows"
        raise InputError("unsupported_format", f"{path}: a {what}; known: {known}")
    return reader.open(path)


def read_labels(path: Path) -> tuple[np.ndarray, Grid]:
    """A whole label image (*space) int32 of any known format, and its grid. Raises InputError."""
    source = open_source(path)
    return whole_labels(source), source.grid


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files that hold the image `path`: itself, the halves of a pair, the slices of a series."""
    path = path.parent if is_volume(path) else path
    reader = reader_of(path)
    return reader.parts(path) if reader else (path,)


def images_of(path: Path) -> tuple[Path, ...]:
    """The images in a folder or archive, each by an address that `open_source` takes; a file is one image itself."""
    reader = reader_of(path)
    try:
        return reader.images(path) if reader else (path,)
    except OSError:
        return (path,)  # opening it says why


def spread(files: Mapping[str, Path], roles: Sequence[str]) -> dict[str, Path]:
    """The files of a case by role; of a case with one file for several roles its volumes, where it has as many."""
    if len(files) == 1 < len(roles):
        path = next(iter(files.values()))
        try:
            source = open_source(path)
        except (InputError, OSError):  # opening it again says why
            return dict(files)
        source.close()
        if len(source.channels) == len(roles):
            return dict(zip(roles, volumes(path, len(roles)), strict=True))
    return dict(files)


def stem_of(path: Path) -> str:
    """The file name without its known suffix; the whole name when the suffix is unknown."""
    return path.name[: len(path.name) - len(suffix_of(path) or "")]
