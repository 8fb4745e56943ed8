"""The files of a DICOM folder or zip: listed, opened one at a time, never written to disk under a name of their own.

An address is a folder, a zip or a file; where a folder or zip holds several series, `<it>/series=<SeriesInstanceUID>`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from medmamba.errors import InputError

SUFFIXES = (".dcm", ".dicom", ".ima")
ZIP = ".zip"
SERIES = "series="
INDEX = "DICOMDIR"  # the table of contents of a medium; it holds no image
MOST_MEMBERS = 200_000
DEFLATE_LIMIT = 1032  # no honest deflate stream unpacks to more than this many times its size


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One file: `name` for messages, `size` in bytes, `open()` a stream that can seek. `path` None inside a zip."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]
    path: Path | None = None


def address(path: Path) -> tuple[Path, str | None]:
    """The folder, zip or file that an address stands on, and the series named in it."""
    return (path.parent, path.name.removeprefix(SERIES)) if path.name.startswith(SERIES) else (path, None)


def members(place: Path) -> list[Member]:
    """The DICOM files of a folder (of its folders, when it holds none itself), of a zip, or the one file.

    Raises InputError for a zip that is damaged, locked or lies about its sizes; OSError for what cannot be listed.
    """
    if place.is_dir():
        return own_members(place) or _known(place.rglob("*"))
    if place.name.lower().endswith(ZIP):
        return _zip_members(place)
    return [_member(place)]


def own_members(folder: Path) -> list[Member]:
    """The DICOM files that lie in a folder itself."""
    return _known(folder.iterdir())


def knows(path: Path) -> bool:
    """Whether an address is a series, a folder that holds DICOM files, or a file that is one by its first bytes."""
    if path.name.startswith(SERIES):
        return True
    if path.is_dir():
        return any(p.is_file() and knows(p) for p in sorted(path.rglob("*")) if not p.name.startswith("."))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _has_mark(file)


def _known(paths: Iterable[Path]) -> list[Member]:
    """DICOM files; beside them also a stump (empty, or zeros where the mark should be): a slice that was lost."""
    found, stumps = [], []
    for path in sorted(paths):
        if path.name.startswith(".") or path.name.upper() == INDEX or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(132)
        if head[128:] == b"DICM" or path.name.lower().endswith(SUFFIXES):
            found.append(_member(path))
        elif not any(head):
            stumps.append(_member(path))
    return found + stumps if found else []


def _member(path: Path) -> Member:
    return Member(str(path), path.stat().st_size, lambda: path.open("rb"), path)


def _has_mark(file: IO[bytes]) -> bool:
    return file.read(132)[128:] == b"DICM"


def _zip_members(path: Path) -> list[Member]:
    if not os.access(path, os.R_OK):
        raise PermissionError(13, "may not be read", str(path))
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise InputError("corrupt_file", f"{path}: not readable as zip ({error}); copy it again") from None
    entries = [e for e in archive.infolist() if not e.is_dir()]
    if len(entries) > MOST_MEMBERS:
        raise InputError("too_large", f"{path}: {len(entries)} files in one zip, {MOST_MEMBERS} may be; unpack it")
    found = []
    for entry in sorted(entries, key=lambda e: e.filename):
        name = f"{path}/{entry.filename}".encode("utf-8", "backslashreplace").decode()
        if entry.flag_bits & 1:
            raise InputError("unsupported_format", f"{name}: is locked with a password; unpack it first")
        if entry.file_size > DEFLATE_LIMIT * entry.compress_size + 4096:
            raise InputError(
                "corrupt_file",
                f"{name}: claims {entry.file_size} bytes out of {entry.compress_size}; make the zip again",
            )
        try:
            with archive.open(entry) as file:
                known = entry.filename.lower().endswith(SUFFIXES) or _has_mark(file)  # type: ignore[arg-type]
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError, RuntimeError) as error:
            raise InputError("corrupt_file", f"{name}: cannot be unpacked ({error}); copy it again") from None
        if known:
            found.append(Member(name, entry.file_size, partial(archive.open, entry)))
    return found
