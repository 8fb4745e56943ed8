"""Change data sets in the folders they are downloaded in: pairs of dates with their labels, split and scene.

| layout | folders (in the root or in train, val, test below it) |
|---|---|
| levir | A B label (LEVIR-CD and what copies it: WHU-CD, DSIFN) |
| mambacd | T1 T2 GT (binary sets of ChangeMamba) |
| mambacd_semantic | T1 T2 GT_CD GT_T1 GT_T2 (SECOND as ChangeMamba and Mamba-FCS read it) |
| second | im1 im2 label1 label2 (SECOND as published; also A B label1 label2) |
| landsat_scd | A B labelA labelB |

Lists of names (`train.txt`, `train_set.txt`, `train_list.txt`; in the root or in `list/`) say the split where there are
any; folders named after a split say it too; else a name that begins with one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmamba.errors import ConfigError
from pipelines.cases.case import safe_id
from pipelines.layouts.change_labels import Classes, detect, read_change

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
CROP = re.compile(r"(.+?)_\d+_\d+$")  # a crop of a scene: name_row_column
SAMPLED = 64  # label pictures looked at to tell how a set is written; `check` looks at all


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of folders. `order` is the class order that ids have in sets of this layout."""

    before: str
    after: str
    change: str | None = None
    earlier: str | None = None
    later: str | None = None
    order: str = "mambacd"

    @property
    def folders(self) -> dict[str, str]:
        """Folder by role."""
        named = {"before": self.before, "after": self.after, "change": self.change}
        named |= {"earlier": self.earlier, "later": self.later}
        return {role: folder for role, folder in named.items() if folder is not None}


LAYOUTS: dict[str, Layout] = {
    "mambacd_semantic": Layout(before="T1", after="T2", change="GT_CD", earlier="GT_T1", later="GT_T2"),
    "mambacd": Layout(before="T1", after="T2", change="GT"),
    "second": Layout(before="im1", after="im2", earlier="label1", later="label2", order="open_cd"),
    "open_cd": Layout(before="A", after="B", earlier="label1", later="label2", order="open_cd"),
    "landsat_scd": Layout(before="A", after="B", earlier="labelA", later="labelB", order="landsat_scd"),
    "levir": Layout(before="A", after="B", change="label"),
}


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Two dates of one place: files by role (before, after, change, earlier, later). `split` may be empty."""

    id: str
    files: dict[str, Path]
    split: str
    group: str


@dataclass(frozen=True, kw_only=True)
class ChangeSet:
    """A data set as found: `classes` None for a binary one; `lists` are the files that told the split."""

    root: Path
    layout: str
    rows: tuple[PairRow, ...]
    classes: Classes | None
    lists: tuple[Path, ...] = ()

    def describe(self) -> str:
        """What was found, in one paragraph."""
        counts = {split: sum(row.split == split for row in self.rows) for split in sorted({r.split for r in self.rows})}
        parts = ", ".join(f"{n} {split or 'without a split'}" for split, n in counts.items())
        labels = "labels are masks of change" if self.classes is None else self.classes.describe()
        return f"{self.root}: layout {self.layout!r}, {len(self.rows)} pairs ({parts}); {labels}"

    def labels(self, row: PairRow) -> tuple[np.ndarray, ...]:
        """Change (H, W) bool, for a semantic set also the ids (H, W) at both dates. Raises InputError.

        Where a set has no mask of change, a pixel changed when it has a class at either date.
        """
        if self.classes is None:
            return (read_change(row.files["change"]),)
        dates = self.classes.read(row.files["earlier"]), self.classes.read(row.files["later"])
        mask = read_change(row.files["change"]) if "change" in row.files else (dates[0] > 0) | (dates[1] > 0)
        return (mask, *dates)


def read_layout(root: Path, *, layout: str | None = None, order: str | None = None) -> ChangeSet:
    """The data set in a folder; its layout is recognised unless named. `order` overrules the class order.

    Raises ConfigError for a folder of no layout, a list that names no picture, an unknown layout or order.
    """
    name = recognise(root) if layout is None else layout
    if name not in LAYOUTS:
        raise ConfigError(f"layout {name!r} unknown; known: {', '.join(LAYOUTS)}")
    found = LAYOUTS[name]
    lists = dict(split_lists(root))
    rows = [row for place, split in places(root, found) for row in rows_of(place, found, split, lists)]
    if not rows:
        raise ConfigError(f"{root}: layout {name!r}, but no picture in {found.before!r} that a list names")
    classes = None
    if found.earlier is not None:
        label_files = (row.files[role] for row in spaced(rows, SAMPLED) for role in ("earlier", "later"))
        present = [path for path in label_files if path.is_file()]
        classes = detect(present, assumed=found.order, order=order)
    ordered = sorted(rows, key=lambda row: (row.split, row.id))
    return ChangeSet(root=root, layout=name, rows=tuple(ordered), classes=classes, lists=tuple(lists.values()))


def change_layout_of(root: Path) -> str | None:
    """The first layout all of whose folders stand in the root or in a split's folder, or None."""
    return next((name for name, layout in LAYOUTS.items() if next(places(root, layout), None) is not None), None)


def recognise(root: Path) -> str:
    """The layout of a change data set. Raises ConfigError for a folder of none."""
    name = change_layout_of(root)
    if name is not None:
        return name
    known = "; ".join(f"{name}: {' '.join(layout.folders.values())}" for name, layout in LAYOUTS.items())
    raise ConfigError(f"{root}: no known layout of a change data set; expected folders {known}")


def places(root: Path, layout: Layout) -> Iterator[tuple[Path, str]]:
    """Folders that hold all folders of a layout, with the split that their name says ("" for the root)."""
    for place, split in [(root, ""), *((root / name, split) for name, split in SPLITS.items())]:
        if all((place / folder).is_dir() for folder in layout.folders.values()):
            yield place, split


def split_lists(root: Path) -> Iterator[tuple[str, Path]]:
    """Lists of names by split."""
    for name, split in SPLITS.items():
        names = [f"{name}.txt", f"{name}_set.txt", f"{name}_list.txt"]
        found = [path for folder in (root, root / "list") for path in (folder / n for n in names) if path.is_file()]
        if found:
            yield split, found[0]


def rows_of(place: Path, layout: Layout, split: str, lists: dict[str, Path]) -> Iterator[PairRow]:
    """Rows of one folder: those its lists name, else every picture of the earlier date."""
    pictures = {p.stem: p for p in sorted((place / layout.before).iterdir()) if p.suffix.lower() in SUFFIXES}
    told = {s: listed(path) for s, path in lists.items() if split in ("", s)}
    chosen = [(s, stem) for s, stems in told.items() for stem in stems] or [(split, stem) for stem in pictures]
    for part, stem in chosen:
        suffix = pictures[stem].suffix if stem in pictures else ".png"
        files = {role: beside(place / folder, stem, suffix) for role, folder in layout.folders.items()}
        crop = CROP.match(stem)
        said = part or next((s for name, s in SPLITS.items() if stem.startswith(f"{name}_")), "")
        name = safe_id(f"{said}/{stem}" if said else stem)
        scene = safe_id(f"{split}/{crop.group(1)}" if split else crop.group(1)) if crop else name  # folders number anew
        yield PairRow(id=name, files=files, split=said, group=scene)


def beside(folder: Path, stem: str, suffix: str) -> Path:
    """The picture of that stem in a folder; with the suffix of the earlier date when there is none."""
    found = (folder / f"{stem}{other}" for other in (suffix, *SUFFIXES))
    return next((path for path in found if path.is_file()), folder / f"{stem}{suffix}")


def listed(path: Path) -> list[str]:
    """Stems named by a list: the first word of every line, with or without folder and suffix."""
    words = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.split()]
    names = [re.split(r"[/\\]", word)[-1] for word in words]
    return [name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name for name in names]


def spaced(rows: list[PairRow], count: int) -> list[PairRow]:
    """At most `count` rows from all over."""
    return rows[:: max(1, -(-len(rows) // count))]
