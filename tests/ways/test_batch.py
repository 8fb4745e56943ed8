"""The batch from folder to results: what is done, set aside, redone; without Prefect (tests/flows has that)."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows import batch, work
from flows.batch import ASIDE, BROKEN, WELL, run_batch
from flows.work import Work, run_in_order
from medmamba.formats.nifti import read_labels
from pipelines.cases import state
from pipelines.cases.state import begin_attempt
from pipelines.report import Report
from pipelines.serving import process
from tests.ways.tiny import make_bundle, write_volume

WATCHED: list[list[Path]] = []


def note_opening(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook (it can never be removed): notes what is opened while anybody watches."""
    if WATCHED and event in ("open", "sqlite3.connect") and isinstance(args[0], str | bytes | os.PathLike):
        WATCHED[0].append(Path(os.fsdecode(args[0])))


sys.addaudithook(note_opening)


@contextmanager
def opened() -> Iterator[list[Path]]:
    """Every file that Python opens inside the block."""
    paths: list[Path] = []
    WATCHED.append(paths)
    yield paths
    WATCHED.clear()


class Batch:
    """One input, bundle and output; MLflow is away."""

    def __init__(self, root: Path) -> None:
        self.input, self.output = root / "in", root / "out"
        self.bundle = make_bundle(root / "bundle")
        self.said: list[str] = []

    def run(self, **options: Any) -> int:
        self.said.clear()
        asked = {"input": self.input, "bundle": str(self.bundle.folder), "output": self.output, "settle": 0, **options}
        return run_batch(echo=self.said.append, **{"runner": run_in_order, **asked})

    @property
    def folder(self) -> Path:
        return self.output / self.bundle.title

    def records(self) -> dict[str, str]:
        return {p.stem: json.loads(p.read_text())["code"] for p in sorted(self.folder.glob("set_aside/*.json"))}

    def reports(self) -> list[str]:
        return sorted(p.name.removesuffix("_dseg.json") for p in self.folder.glob("*_dseg.json"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)
    return Batch(tmp_path)


def test_twenty_cases_three_bad(job: Batch) -> None:
    for i in range(17):
        write_volume(job.input / f"good{i:02d}.nii.gz", i)
    whole = write_volume(job.input / "truncated.nii.gz").read_bytes()
    (job.input / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (job.input / "empty.nii.gz").touch()
    write_volume(job.input / "constant.nii.gz", constant=True)
    assert job.run() == ASIDE
    assert job.reports() == [f"good{i:02d}" for i in range(17)]
    assert job.records() == {"constant": "empty_image", "empty": "corrupt_file", "truncated": "corrupt_file"}
    assert (job.folder / "report.html").is_file()
    assert any("MLflow" in line for line in job.said)
    labels, grid = read_labels(job.folder / "good03_dseg.nii.gz")
    assert labels.shape == grid.shape == (12, 12, 12)

    before = {p: p.stat().st_mtime_ns for p in job.folder.rglob("*")}
    with opened() as paths:
        assert job.run() == ASIDE
    assert {p.suffix for p in paths} >= {".json", ".sqlite"}  # reports and index were looked at, so the watch works
    assert [p for p in paths if p.suffix in (".nii", ".gz", ".png")] == []
    assert "nothing due, 17 done before, 3 set aside before" in job.said[0]
    assert {p: p.stat().st_mtime_ns for p in job.folder.rglob("*")} == before


def test_a_repaired_case_leaves_quarantine(job: Batch) -> None:
    path = job.input / "a.nii"
    write_volume(path, constant=True)
    assert job.run() == ASIDE
    write_volume(path, 1)
    assert job.run() == WELL
    assert (job.records(), job.reports()) == ({}, ["a"])


def test_an_unforeseen_error_stops_nothing(job: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_volume(job.input / f"{name}.nii")
    real = process.predict

    def failing(predictor: Any, case: Any, output: Path, progress: Any = None) -> Report:
        if case.id == "b":
            raise KeyError("nobody foresaw this")
        return real(predictor, case, output, progress)

    monkeypatch.setattr(process, "predict", failing)
    assert job.run() == ASIDE
    assert (job.reports(), job.records()) == (["a", "c"], {"b": "internal_error"})
    assert "KeyError" in (job.folder / "set_aside" / "b.log").read_text()
    monkeypatch.setattr(process, "predict", real)
    assert job.run() == ASIDE
    assert job.run(retry="internal_error") == WELL
    assert not list((job.folder / "set_aside").iterdir())


def test_damaged_products_are_noticed(job: Batch) -> None:
    for name in "abc":
        write_volume(job.input / f"{name}.nii", ord(name))
    job.run()
    kept = (job.folder / "a_dseg.nii.gz").read_bytes()
    picture = (job.folder / "b_dseg.png").read_bytes()
    (job.folder / "a_dseg.nii.gz").write_bytes(kept[:-5])
    (job.folder / "b_dseg.png").unlink()
    (job.folder / "c_dseg.json").write_text("{")
    assert job.run() == WELL
    assert job.said[0].startswith("3 cases: 3 due")
    assert (job.folder / "a_dseg.nii.gz").read_bytes() == kept
    assert (job.folder / "b_dseg.png").read_bytes() == picture
    assert job.run() == WELL
    assert "nothing due, 3 done before" in job.said[0]


def test_a_case_that_killed_twice_is_not_started_again(job: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volume(job.input / "a.nii")
    keys: list[str] = []

    def note(found: Work, workers: int) -> None:
        keys.extend(item.key for item in found.items)

    assert job.run(runner=note) == BROKEN  # nothing ran: told as broken
    for _ in range(2):
        begin_attempt(job.output, job.bundle.title, "a", keys[0])
    assert job.run() == ASIDE
    assert job.records() == {"a": "killed"}
    assert job.run(retry="killed") == WELL


def test_memory_is_asked_before_a_case_starts(job: Batch) -> None:
    write_volume(job.input / "a.nii")
    assert job.run(ram="10K") == ASIDE
    assert job.records() == {"a": "too_large"}
    assert job.run(ram="1G", retry="too_large") == WELL


def test_a_passing_error_is_mended_by_another_try(job: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_volume(job.input / f"{name}.nii")
    real, started = process.predict, []

    def stuttering(predictor: Any, case: Any, output: Path, progress: Any = None) -> Report:
        started.append(case.id)
        if started == ["a"]:
            raise OSError(errno.EIO, "disk stutters")
        return real(predictor, case, output, progress)

    def twice(found: Work, workers: int) -> None:
        with pytest.raises(OSError, match="stutters"):
            found.run(["a", "b"], last=False, slot=work.gpu_lock)
        found.run(["a", "b"], last=True, slot=work.gpu_lock)

    monkeypatch.setattr(process, "predict", stuttering)
    assert job.run(runner=twice) == WELL
    assert started == ["a", "b", "a"]


def test_more_than_a_thousand_cases_go_in_chunks_of_fifty(job: Batch) -> None:
    def items(n: int) -> Any:
        return [process.Item(case=process_case(i), key="") for i in range(n)]

    def process_case(i: int) -> Any:
        from pipelines.cases.case import Case

        return Case(id=f"c{i}", files={"ct": Path("x.nii")})

    sizes = {n: [len(c) for c in Work(place=None, items=items(n)).chunks()] for n in (3, 1001)}  # type: ignore[arg-type]
    assert sizes[3] == [1, 1, 1]
    assert sizes[1001] == [50] * 20 + [1]


def test_broken_set_up_is_one_line_and_code_one(job: Batch) -> None:
    write_volume(job.input / "a.nii")
    wrong: list[dict[str, Any]] = [
        {"bundle": "nowhere"},
        {"input": job.input / "nowhere"},
        {"device": "toaster"},
        {"ram": "much"},
        {"workers": 0},
        {"retry": "no_such_code"},
    ]
    for options in wrong:
        assert job.run(**options) == BROKEN, options
        assert job.said[-1].startswith("error: "), options
    with state.lock(job.output):
        assert job.run() == BROKEN
    assert "a batch runs there already" in job.said[-1]


def test_a_name_that_is_not_text_is_no_obstacle(job: Batch) -> None:
    path = write_volume(job.input / "a.nii")
    strange = os.fsencode(job.input) + b"/b\xff.nii"
    Path(os.fsdecode(strange)).write_bytes(path.read_bytes()[:400])
    assert job.run() == ASIDE
    assert job.reports() == ["a"]
    assert job.records() == {"b": "corrupt_file"}
