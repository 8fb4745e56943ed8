"""The contents of an image as one hash, whether it is one file, a header and its data file, or a series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medmamba.files import hash_file, hash_json
from medmamba.formats.volume import is_volume
from pipelines.cases.formats import parts_of


def content_hash(
    path: Path,
    hash_one: Callable[[Path], str] = hash_file,
    parts_of: Callable[[Path], tuple[Path, ...]] = parts_of,
) -> str:
    """SHA-256 of a file; of several parts the hash of their sorted hashes, so that names of slices do not matter; of
    an image in an archive or a volume of a file the hash of that and its name there. `hash_one` may answer from an
    index."""
    parts = parts_of(path)
    hashes = sorted(hash_one(part) for part in parts)
    if (len(parts) == 1 and parts[0] != path) or is_volume(path):
        hashes.append(path.name)
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def printable(path: Path) -> str:
    """The path as text that JSON can hold: bytes that are not UTF-8 become `\\xNN`."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
