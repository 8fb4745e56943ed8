"""The contents of an image as one hash, whether it is one file or a header and its data file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medmamba.files import hash_file, hash_json

PAIR = (".hdr", ".img")


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files that hold one image: itself, or both halves of a `.hdr` + `.img` pair (header first)."""
    if path.suffix.lower() not in PAIR:
        return (path,)
    beside = path.with_suffix(".img" if path.suffix.lower() == ".hdr" else ".hdr")
    if not beside.exists():
        return (path,)
    return (path, beside) if path.suffix.lower() == ".hdr" else (beside, path)


def content_hash(path: Path, hash_one: Callable[[Path], str] = hash_file) -> str:
    """SHA-256 of a file; of a pair the hash of both hashes. `hash_one` may answer from an index."""
    hashes = [hash_one(part) for part in parts_of(path)]
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def printable(path: Path) -> str:
    """The path as text that JSON can hold: bytes that are not UTF-8 become `\\xNN`."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
