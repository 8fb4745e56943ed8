"""Pairs of scenes to compare: from a CSV list, a STAC catalogue on disk, or a folder of two dates; of more dates of one
place each is compared with the next in time.

Raises ConfigError when a list cannot be used, with every fault it found.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pystac

from medmamba.errors import ConfigError

FOLDERS = (("before", "after"), ("A", "B"), ("T1", "T2"), ("im1", "im2"))  # dates of a folder: ours and the field's
LISTED, SERIES = frozenset({"id", "before", "after"}), frozenset({"place", "date", "scene"})  # columns of a CSV
GROUPS = ("grid:code", "s2:mgrs_tile", "landsat:wrs_path")  # properties that say that two items show one place


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two scenes of one place; `id` is safe as a file name. Dates are ISO 8601 or empty."""

    id: str
    before: Path
    after: Path
    date_before: str = ""
    date_after: str = ""


def find_pairs(path: Path) -> list[Pair]:
    """The pairs of a CSV file, a STAC catalogue (JSON, or a folder with catalog.json), or a folder of two dates."""
    if path.suffix.lower() == ".csv":
        found = pairs_of_csv(path)
    elif path.suffix.lower() == ".json":
        found = pairs_of_catalogue(path)
    elif (path / "catalog.json").is_file():
        found = pairs_of_catalogue(path / "catalog.json")
    else:
        found = pairs_of_folder(path)
    twice = sorted({p.id for p in found if sum(q.id == p.id for q in found) > 1})
    if twice or not found:
        raise ConfigError(f"{path}: {'pairs named twice: ' + ', '.join(twice) if twice else 'no pair found'}")
    return found


def pairs_of_csv(path: Path) -> list[Pair]:
    """Rows `id,before,after[,date_before,date_after]`, or `place,date,scene` with any number of dates a place; paths
    relative to the list."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        named, rows = set(reader.fieldnames or ()), list(reader)
    if named >= SERIES:
        return pairs_of_series(path, rows)
    if not named >= LISTED:
        wanted = f"{', '.join(sorted(LISTED))} or {', '.join(sorted(SERIES))}"
        raise ConfigError(f"{path}: columns {sorted(named)}; expected {wanted}")
    require_filled(path, rows, LISTED, files=("before", "after"))
    return [
        Pair(
            id=safe(r["id"]),
            before=path.parent / r["before"],
            after=path.parent / r["after"],
            date_before=r.get("date_before") or "",
            date_after=r.get("date_after") or "",
        )
        for r in rows
    ]


def pairs_of_series(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Pair]:
    """The scenes of every place in order of their dates (ISO 8601), each with the next one."""
    require_filled(path, rows, SERIES, files=("scene",))
    places: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        places.setdefault(row["place"], []).append(row)
    twice = [name for name, dates in places.items() if len({r["date"] for r in dates}) < len(dates)]
    if twice:
        raise ConfigError(f"{path}: two scenes of one date at {', '.join(sorted(twice))}; mosaic them or drop one")
    return [
        Pair(
            id=safe(f"{place}_{one['date']}_{other['date']}"),
            before=path.parent / one["scene"],
            after=path.parent / other["scene"],
            date_before=one["date"],
            date_after=other["date"],
        )
        for place, dates in places.items()
        for one, other in pairwise(sorted(dates, key=lambda r: r["date"]))
    ]


def require_filled(path: Path, rows: Sequence[Mapping[str, str]], columns: Set[str], files: Sequence[str]) -> None:
    """Raises ConfigError listing the lines where a column is empty or a file does not exist."""
    faults = [f"line {n}: {k} is empty" for n, r in enumerate(rows, 2) for k in sorted(columns) if not r[k]]
    faults += [
        f"line {n}: {path.parent / r[k]} does not exist"
        for n, r in enumerate(rows, 2)
        for k in files
        if r[k] and not (path.parent / r[k]).exists()
    ]
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults))


def pairs_of_folder(folder: Path) -> list[Pair]:
    """Files (or SAFE folders) of equal name in two folders named as FOLDERS says."""
    for first, second in FOLDERS:
        one, two = folder / first, folder / second
        if one.is_dir() and two.is_dir():
            names = sorted(p.name for p in one.iterdir() if not p.name.startswith("."))
            lost = [n for n in names if not (two / n).exists()]
            lost += sorted(p.name for p in two.iterdir() if not p.name.startswith(".") and not (one / p.name).exists())
            if lost:
                raise ConfigError(f"{folder}: {len(lost)} names in {first}/ or {second}/ only: {', '.join(lost[:5])}")
            return [Pair(id=safe(Path(n).stem), before=one / n, after=two / n) for n in names]
    raise ConfigError(f"{folder}: none of the folder pairs {FOLDERS}; give a CSV with id, before, after instead")


def pairs_of_catalogue(path: Path) -> list[Pair]:
    """Items of one place (a GROUPS property, else equal boxes to 1e-4 degree), each with the next in time."""
    try:
        catalogue = pystac.read_file(str(path))
    except (OSError, ValueError, KeyError, pystac.STACError, pystac.errors.STACTypeError) as error:
        raise ConfigError(f"{path}: not a STAC catalogue on disk ({error})") from error
    items = [catalogue] if isinstance(catalogue, pystac.Item) else list(items_of(catalogue))
    places: dict[str, list[pystac.Item]] = {}
    for item in items:
        named = next((f"{key}={item.properties[key]}" for key in GROUPS if key in item.properties), None)
        places.setdefault(named or str([round(v, 4) for v in item.bbox or ()]), []).append(item)
    return [
        Pair(
            id=safe(f"{a.id}_{b.id}"),
            before=scene_file(a),
            after=scene_file(b),
            date_before=moment(a),
            date_after=moment(b),
        )
        for _, group in sorted(places.items())
        for a, b in pairwise(sorted(group, key=moment))
    ]


def items_of(catalogue: pystac.STACObject) -> Iterable[pystac.Item]:
    """All items below a catalogue. Raises ConfigError for anything else."""
    if not isinstance(catalogue, pystac.Catalog):
        raise ConfigError(f"{catalogue.self_href}: {type(catalogue).__name__} is no catalogue and no collection")
    return catalogue.get_items(recursive=True)


def scene_file(item: pystac.Item) -> Path:
    """The file of an item: the asset with role "data" (else the only one), on this disk."""
    data = [a for a in item.assets.values() if "data" in (a.roles or ())] or list(item.assets.values())
    if len(data) != 1:
        raise ConfigError(f"STAC item {item.id}: {len(data)} data assets; a scene is one file or one folder")
    address = data[0].get_absolute_href() or data[0].href
    if re.match(r"[a-z0-9]+://", address):
        raise ConfigError(f"STAC item {item.id}: {address} is not on this disk; fetch it first")
    return Path(address)


def moment(item: pystac.Item) -> str:
    """When an item was taken, ISO 8601."""
    when = item.datetime or item.common_metadata.start_datetime
    return when.isoformat() if when else ""


def safe(name: str) -> str:
    """A name with nothing that a file name cannot hold."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "pair"
