"""Which pairs an input holds: two files, a CSV, a folder of two dates, a STAC catalogue on disk; and their files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from geo.align import overlap
from geo.formats import open_scene
from geo.formats.geotiff import SUFFIXES
from geo.pairs import Pair, find_pairs
from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from pipelines.cases.archive import Found, require_apart, young
from pipelines.cases.case import Case, safe_id
from pipelines.serving.budget import loop_bytes, streamed
from pipelines.serving.pair_view import ROLES, STRIP

READING = 80 << 20  # bytes of GDAL's block cache and of rows of both dates on their way onto one grid, measured
SIDECARS = (".aux.xml", ".msk", ".tfw", ".pgw", ".jgw", ".wld", ".prj")  # what GDAL reads beside a raster


def find(
    source: Path,
    roles: Sequence[str],
    *,
    output: Path,
    settle: float = 60.0,
    follow: bool = False,
    now: float | None = None,
) -> Found:
    """The pairs of a CSV (id, before, after, dates), a STAC catalogue or a folder; `roles` are those of the bundle.

    A pair with a file changed less than `settle` seconds before `now` waits. Raises ConfigError.
    """
    require_apart(source, output)
    cases = [case_of(pair) for pair in find_pairs(source)]
    moment = time.time() if now is None else now
    ready = [c for c in cases if not young(c, settle, moment, parts_of)]
    return Found(cases=tuple(ready), waiting=len(cases) - len(ready))


def cases_of(files: Sequence[Path], roles: Sequence[str], *, output: Path) -> list[Case]:
    """The one pair that two files are; of more files in order of time each with the next; or every pair of a list,
    catalogue or folder. Raises ConfigError."""
    if len(files) == 1:
        return list(find(files[0], roles, output=output, settle=0).cases)
    cases = []
    for pair in pairwise(files):
        names = dict.fromkeys(path.resolve().name.partition(".")[0] for path in pair)
        cases.append(Case(id=safe_id("-".join(names)), files=dict(zip(ROLES, pair, strict=True))))
    twice = sorted({c.id for c in cases if sum(other.id == c.id for other in cases) > 1})
    if twice:
        raise ConfigError(f"pairs {', '.join(twice)} would have the same name; list the scenes in a CSV instead")
    return cases


def case_of(pair: Pair) -> Case:
    """A pair as the batch knows it."""
    dates = {role: date for role, date in zip(ROLES, (pair.date_before, pair.date_after), strict=True) if date}
    return Case(id=safe_id(pair.id), files={"before": pair.before, "after": pair.after}, dates=dates)


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files a scene is made of: those of its folder, what a VRT names, what lies beside it."""
    if path.is_dir():
        return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
    beside = [path.with_name(path.name + end) for end in SIDECARS] + [path.with_suffix(end) for end in SIDECARS]
    named: list[Path] = []
    if path.name.lower().endswith(".vrt") and path.name.lower().endswith(SUFFIXES):
        try:
            scene = open_scene(path)
            named = [Path(name) for name in scene.dataset.files]  # type: ignore[union-attr]
            scene.close()
        except InputError:
            pass  # opening it again says why
    return tuple(dict.fromkeys([path, *(p for p in (*named, *beside) if p.is_file())]))


def predicted_bytes(bundle: Bundle, case: Case, mode: str = "windows") -> int:
    """Bytes held at once for a pair, from the headers: what the loop over its strips holds, and READING.

    Nothing else grows with the scene; a fault in a file is told by whoever opens it in earnest.
    """
    shape = _overlap(case)
    return READING + loop_bytes(bundle, shape, mode, STRIP) if shape else 0


def predicted_scratch(bundle: Bundle, case: Case, mode: str) -> int:
    """Bytes of disk that the maps of a streamed pair take at once, at most; windows need none."""
    shape = _overlap(case)
    return streamed(bundle, shape).scratch if shape and mode == "stream" else 0


def _overlap(case: Case) -> tuple[int, ...]:
    """The shape of the ground that both dates show; none of files that cannot be compared."""
    try:
        scenes = [open_scene(case.files[role]) for role in ROLES if role in case.files]
        low, high = overlap(scenes[0].grid, scenes[-1].grid)
        for scene in scenes:
            scene.close()
    except (InputError, IndexError):
        return ()
    return tuple(max(b - a, 1) for a, b in zip(low, high, strict=True))
