"""Which cases an input holds, and which of them are due. Reads no voxel; writes nothing but the index of hashes."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medmamba.bundle import Bundle
from medmamba.errors import REASON_CODES, ConfigError, InputError
from medmamba.files import hash_file
from pipelines.cases.case import Case, safe_id
from pipelines.cases.contents import content_hash, printable
from pipelines.cases.formats import images_of, parts_of, spread, stem_of, suffix_of
from pipelines.cases.manifest import layout_of, read_manifest
from pipelines.cases.state import STATE, Index, read_attempt
from pipelines.cases.walk import Walk, walk
from pipelines.report import Report, case_key
from pipelines.serving.products import product_path

NUMBERED = re.compile(r"(.+)_(\d{4})")
TABLES = (".csv", ".tsv", ".json")
Parts = Callable[[Path], tuple[Path, ...]]  # all files behind a path


@dataclass(frozen=True, kw_only=True)
class Found:
    """`cases` to look at, how many wait because a file is too young, and what else was seen (sentences)."""

    cases: tuple[Case, ...]
    waiting: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Item:
    """A case with its `key`, its `contents` (hash by role) and, when a file cannot be read, the `fault`.

    `report` is the case's report or set-aside record where there is one that counts."""

    case: Case
    key: str
    contents: Mapping[str, str] = field(default_factory=dict)
    fault: InputError | None = None
    report: Report | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every case in exactly one place."""

    due: tuple[Item, ...] = ()
    done: tuple[Item, ...] = ()
    set_aside: tuple[Item, ...] = ()
    outdated: tuple[Item, ...] = ()


def find(
    source: Path,
    roles: Sequence[str],
    *,
    output: Path,
    settle: float = 60.0,
    follow: bool = False,
    now: float | None = None,
) -> Found:
    """The cases of a folder, a table, a data set (nnU-Net, BIDS, MONAI list) or a single file, for `roles` of a bundle.

    In a folder a file is a case; for a bundle of several roles `X_0000`, `X_0001` ... are the roles of case X in order,
    and so are the volumes of a 4D file that has as many.
    A case with a file changed less than `settle` seconds before `now` waits. Raises ConfigError.
    """
    require_apart(source, output)
    notes: list[str] = []
    if layout_of(source) or source.name.lower().endswith(TABLES):
        cases, unused = read_manifest(source, roles)
        notes += [f"columns {unused} are not used by this bundle"] if unused else []
    elif source.is_dir():
        seen = walk(source, output=output, follow=follow)
        cases = _group(source, seen, roles)
        notes += _told(seen)
    else:
        cases = _group(source.parent, Walk(files=list(images_of(source) or (source,))), roles)
    ready = [c for c in cases if not young(c, settle, time.time() if now is None else now)]
    return Found(cases=tuple(ready), waiting=len(cases) - len(ready), notes=tuple(notes))


def cases_of(files: Sequence[Path], roles: Sequence[str], *, output: Path) -> list[Case]:
    """The one case that `files` are, in the order of `roles` (or one 4D file with a volume a role); or every case of a
    folder or zip given alone.

    Raises ConfigError when the number of files does not fit or the folder holds no case.
    """
    if len(files) == 1 and (files[0].is_dir() or images_of(files[0]) != (files[0],)):
        found = list(find(files[0], roles, output=output, settle=0).cases)
        if not found:
            raise ConfigError(f"{files[0]}: holds no image that a reader knows")
        return found
    given = spread(dict(zip(roles, files, strict=False)), roles)
    if len(given) != len(roles) or len(files) > len(roles):
        raise ConfigError(f"{len(files)} files given, the bundle wants {len(roles)}: {', '.join(roles)}")
    return [Case(id=safe_id(stem_of(files[0])), files=given)]


def require_apart(source: Path, output: Path) -> None:
    """Raises ConfigError when the input is not there or is itself an output folder."""
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; give the images' folder, a CSV table or one image")
    if source.is_dir() and ((source / STATE).is_dir() or (output.exists() and source.samefile(output))):
        raise ConfigError(f"{source}: is the output folder of a batch; keep input and output in folders of their own")


def _told(seen: Walk) -> list[str]:
    counts = {
        "files of other kinds ignored": seen.ignored,
        "own products left out": seen.products,
        "links to folders not followed (--follow does)": seen.links,
        "links that lead back into themselves refused": seen.loops,
        "folders may not be listed": len(seen.closed),
    }
    return [f"{n} {text}" for text, n in counts.items() if n]


def _group(root: Path, seen: Walk, roles: Sequence[str]) -> list[Case]:
    """Images to cases, ids made unique; a closed folder stands as a case of its own, set aside as `permission`."""
    groups: dict[tuple[str, str], dict[str, Path]] = {}
    for path in seen.files:
        name = path.relative_to(root).as_posix() if path != root else root.resolve().name
        suffix = suffix_of(path) or (path.suffix if path.is_file() or path.is_symlink() else "")
        stem, role = _role(name[: -len(suffix) or None], roles)
        groups.setdefault((stem, name[-len(suffix) :] if suffix else "/"), {})[role] = path
    for folder in seen.closed:
        groups[(folder.relative_to(root).as_posix(), "/")] = {roles[0]: folder}
    names = {place: safe_id(place[0]).strip("._-") or "case" for place in groups}
    taken = Counter(name.casefold() for name in names.values())
    for (stem, suffix), name in names.items():
        if (
            taken[name.casefold()] > 1 or len(name) >= 160
        ):  # every one of them, so that no arrival renames another's product
            digest = hashlib.sha256(os.fsencode(stem + suffix)).hexdigest()[:8]
            names[stem, suffix] = f"{name}-{digest}"
    return [Case(id=names[place], files=spread(files, roles)) for place, files in groups.items()]


def _role(stem: str, roles: Sequence[str]) -> tuple[str, str]:
    """Case stem and role of a file. A bundle of one role takes every file as a case and drops `_0000` alone."""
    match = NUMBERED.fullmatch(stem)
    number = int(match[2]) if match else 0
    if match is None or (len(roles) == 1 and number):
        return stem, roles[0]
    return match[1], roles[number] if number < len(roles) else f"channel_{number:04d}"


def young(case: Case, settle: float, now: float, parts: Parts = parts_of) -> bool:
    """Whether any file was changed in the last `settle` seconds; a time in the future counts as settled."""
    for path in case.files.values():
        try:
            states = [part.stat() for part in parts(path)]
        except OSError:
            continue
        if any(0 <= now - moment < settle for s in states for moment in (s.st_mtime, s.st_ctime)):
            return True
    return False


def due(
    cases: Sequence[Case],
    bundle: Bundle,
    output: Path,
    *,
    index: Index,
    retry: str | None = None,
    verify: bool = False,
    reprocess: bool = False,
    mode: str = "windows",
    parts: Parts = parts_of,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Sorts cases into due, done, set aside and outdated (finished with an older bundle of the same name).

    `retry` (a reason code or "all") makes set-aside cases due again, `reprocess` outdated ones; `verify` reads every
    input and output instead of trusting sizes and times; `mode` of inference is part of what is due. `progress(done,
    all)` is called after each case.
    """
    require_code(retry)
    older = older_folders(bundle, output)
    places: dict[str, list[Item]] = {"due": [], "done": [], "set_aside": [], "outdated": []}
    for number, case in enumerate(cases, start=1):
        with index.together():
            known = identify(case, bundle, index, verify, mode, parts)
        place, item = _place(known, bundle, output, retry, verify, older)
        places["due" if place == "outdated" and reprocess else place].append(item)
        if progress:
            progress(number, len(cases))
    return Plan(**{name: tuple(items) for name, items in places.items()})


def require_code(retry: str | None) -> None:
    """Raises ConfigError unless `retry` is None, "all" or a reason code."""
    if retry not in (None, "all", *REASON_CODES):
        raise ConfigError(f"--retry {retry}: unknown code; known: all, {', '.join(REASON_CODES)}")


def identify(
    case: Case,
    bundle: Bundle,
    index: Index,
    verify: bool = False,
    mode: str = "windows",
    parts: Parts = parts_of,
) -> Item:
    """Key and contents of a case; a file that cannot be read is the item's fault, part of its key while it lasts."""
    contents: dict[str, str] = {}
    fault = None
    for role in bundle.preprocessing.roles:
        if role in case.files:
            try:
                contents[role] = content_hash(case.files[role], lambda p: index.hash(p, reread=verify), parts)
            except OSError as error:
                problem = _fault(case.files[role], error)
                contents[role] = f"fault:{problem.code}"
                fault = fault or problem
    return Item(case=case, key=case_key(contents, bundle, mode), contents=contents, fault=fault)


def _fault(path: Path, error: OSError) -> InputError:
    name = printable(path)
    if isinstance(error, FileNotFoundError):
        return InputError("missing_file", f"{name}: no such file; correct the manifest or bring it back")
    if isinstance(error, PermissionError) or not os.access(path, os.R_OK):
        return InputError("permission", f"{name}: may not be read; give this user read permission")
    if isinstance(error, IsADirectoryError):
        return InputError("unsupported_format", f"{name}: is a folder; expected an image file")
    return InputError("corrupt_file", f"{name}: cannot be read ({error.strerror}); check the disk or copy it again")


def _place(
    item: Item, bundle: Bundle, output: Path, retry: str | None, verify: bool, older: Sequence[Path]
) -> tuple[str, Item]:
    case = item.case.id
    folder, report_path = output / bundle.title, product_path(output, bundle, item.case, ".json")
    report = Report.load(report_path)
    attempt = read_attempt(output, bundle.title, case)
    untouched = attempt is None or attempt.key == item.key  # else a process died while it replaced these products
    if report and report.key == item.key and untouched and whole(report, folder, verify):
        return "done", replace(item, report=report)
    record = Report.load(set_aside_path(output, bundle, case))
    if record and record.status == "set_aside" and record.key == item.key and retry not in ("all", record.code):
        return "set_aside", replace(item, report=record)
    if record is None or record.key != item.key:
        for other in older:
            past = Report.load(other / report_path.relative_to(folder))
            if past and _same_contents(past, item) and whole(past, other, verify):
                return "outdated", replace(item, report=past)
    return "due", item


def _same_contents(report: Report, item: Item) -> bool:
    return item.contents == {r: v.get("sha256") for r, v in report.inputs.items() if r in item.contents}


def whole(report: Report, folder: Path, verify: bool = False) -> bool:
    """Whether every product of a finished report is there with its recorded size; with `verify` also its hash."""
    if report.status != "done" or not report.outputs:
        return False
    try:
        for name, facts in report.outputs.items():
            path = folder / name
            if path.stat().st_size != facts["size"] or (verify and hash_file(path) != facts["sha256"]):
                return False
    except OSError:
        return False
    return True


def older_folders(bundle: Bundle, output: Path) -> list[Path]:
    """Product folders of other bundles of the same name, the newest first."""
    pattern = re.compile(re.escape(bundle.name) + r"-[0-9a-f]{8}")
    if not output.is_dir():
        return []
    folders = [p for p in output.iterdir() if p.is_dir() and pattern.fullmatch(p.name) and p.name != bundle.title]
    return sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)


def set_aside_path(output: Path, bundle: Bundle, case: str) -> Path:
    """Where the record of a set-aside case lies; a traceback lies beside it as `.log`."""
    return output / bundle.title / "set_aside" / f"{case}.json"


def input_facts(item: Item, parts: Parts = parts_of) -> dict[str, dict[str, object]]:
    """What a record says of a case's files: path, size (of all its parts) and hash, null where unknown."""
    facts: dict[str, dict[str, object]] = {}
    for role, path in item.case.files.items():
        try:
            size: int | None = sum(part.stat().st_size for part in parts(path))
        except OSError:
            size = None
        known = item.contents.get(role, "fault:")
        facts[role] = {"path": printable(path), "size": size, "sha256": None if known.startswith("fault:") else known}
    return facts
