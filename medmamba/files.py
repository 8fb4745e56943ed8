"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder; and content hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".part"
MODE = 0o640  # patient data: the owner writes, the group reads


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well; else nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), MODE)
            yield file
            file.flush()
            os.fsync(file.fileno())
        step("written", temporary)
        temporary.replace(path)
        sync_folder(path.parent)
        step("renamed", path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`data` under `path`, atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: Path, values: Any) -> None:
    """Readable JSON under `path`, atomically; NaN is refused."""
    write_bytes(path, (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step(name: str, path: Path) -> None:
    """Marks a durable step. Does nothing; the kill tests replace it to die here."""


def hash_file(path: Path) -> str:
    """SHA-256 of the contents, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(values: Any) -> str:
    """SHA-256 of the canonical JSON text."""
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()
