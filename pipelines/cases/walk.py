"""The images below a folder, files or series: links, loops, closed folders and our own products told apart."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.cases.formats import READERS, images_of, knows, suffix_of
from pipelines.cases.state import STATE
from pipelines.tasks.segmentation import SUFFIX


@dataclass
class Walk:
    """`files` images (dead links too, and folders that are one image, a series of slices), `closed` folders that may
    not be listed; the rest are counts for the summary."""

    files: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)
    ignored: int = 0
    products: int = 0
    links: int = 0
    loops: int = 0


def walk(root: Path, *, output: Path, follow: bool) -> Walk:
    """Every image file below `root`, sorted. `output` and any folder that is a batch's output are left out.

    Links to files are followed; links to folders only with `follow`, and never back into a folder above (a loop).
    """
    found = Walk()
    _enter(root, found, barred=_identity(output), follow=follow, above=())
    return found


def is_product(path: Path) -> bool:
    """Whether a file is a label image that we wrote: its sidecar JSON says so."""
    suffix = suffix_of(path) or ""
    stem = path.name[: len(path.name) - len(suffix)]
    if not stem.endswith(f"_{SUFFIX}"):
        return False
    try:
        makers = json.loads(path.with_name(f"{stem}.json").read_text(encoding="utf-8")).get("GeneratedBy", [])
        return any(maker.get("Name") == "medmamba" for maker in makers)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _enter(
    folder: Path, found: Walk, *, barred: tuple[int, int] | None, follow: bool, above: tuple[object, ...]
) -> None:
    here = _identity(folder)
    if here is not None and here in above:
        found.loops += 1
        return
    if here is not None and (here == barred or (above and (folder / STATE).is_dir())):
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda e: e.name)
    except PermissionError:
        found.closed.append(folder)
        return
    except FileNotFoundError:
        return
    series = False
    for entry in entries:
        path = folder / entry.name
        if _is_slice(path, entry, series):
            series = True
        elif _is_folder(entry):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not follow:
                found.links += 1
            else:
                _enter(path, found, barred=barred, follow=follow, above=(*above, here))
        else:
            _take(path, entry, found)
    if series:
        _add(folder, found)


def _take(path: Path, entry: os.DirEntry[str], found: Walk) -> None:
    """Sorts one entry that is no folder; a pipe or socket is ignored, so that nothing blocks on it."""
    dead_link = entry.is_symlink() and not path.exists()
    if entry.name.startswith(".") or suffix_of(path) is None or not (dead_link or path.is_file()):
        found.ignored += 1
    elif is_product(path):
        found.products += 1
    elif path.suffix.lower() == ".img" and path.with_suffix(".hdr").exists():
        pass  # the second half of a pair; its header stands for both
    else:
        _add(path, found)


def _add(path: Path, found: Walk) -> None:
    """The images in a file, archive or folder of slices; one that holds none counts as another kind."""
    images = images_of(path)
    found.files.extend(images)
    found.ignored += not images


def _is_slice(path: Path, entry: os.DirEntry[str], series: bool) -> bool:
    """Whether a file belongs to a series: known by its first bytes, or any file without a known suffix beside one that
    is (so that a series of thousands is not opened file by file)."""
    reader = READERS.get(suffix_of(path) or "")
    if entry.name.startswith(".") or (reader and not reader.knows) or not path.is_file():
        return False
    try:
        return series or knows(path) is not None
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
