"""Which cases there are and which are due: ids, links, settling, states; no network runs here."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError
from medmamba.files import hash_file
from pipelines.cases import archive, state
from pipelines.cases.archive import Plan, due, find
from pipelines.cases.case import PRODUCTS, Case
from pipelines.cases.contents import content_hash
from pipelines.cases.manifest import read_manifest
from pipelines.cases.state import Index, begin_attempt, lock
from pipelines.layouts import nnunet
from pipelines.report import Report
from pipelines.serving.products import product_path
from tests.ways.tiny import make_bundle

LATER = 3600.0  # a run so long after the files were made that all have settled


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())


def ids(folder: Path, roles: tuple[str, ...] = ("ct",), **options: object) -> list[str]:
    options = {"output": folder.parent / "out", "now": time.time() + LATER, **options}
    return sorted(c.id for c in find(folder, roles, **options).cases)  # type: ignore[arg-type]


def plan(cases: list[Case], bundle: Bundle, output: Path, **options: object) -> Plan:
    with Index(output) as index:
        return due(cases, bundle, output, index=index, **options)  # type: ignore[arg-type]


def finish(case: Case, bundle: Bundle, output: Path) -> Report:
    """What `predict` leaves behind, with two bytes for an image."""
    label = product_path(output, bundle, case, ".nii.gz")
    touch(label)
    item = plan([case], bundle, output).due[0]
    report = Report(
        case=case.id,
        key=item.key,
        status="done",
        bundle={},
        inputs=archive.input_facts(item),
        outputs={
            label.relative_to(output / bundle.title).as_posix(): {
                "size": label.stat().st_size,
                "sha256": hash_file(label),
            }
        },
    )
    report.save(product_path(output, bundle, case, ".json"))
    return report


def set_aside(case: Case, bundle: Bundle, output: Path, code: str = "corrupt_file") -> None:
    item = plan([case], bundle, output).due[0]
    record = Report(case=case.id, key=item.key, status="set_aside", bundle={}, inputs={}, code=code, message="")
    record.save(archive.set_aside_path(output, bundle, case.id))


def test_a_file_is_a_case_and_other_files_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source / "a.nii", source / "sub" / "b.NII.GZ", source / "notes.txt", source / ".hidden.nii")
    found = find(source, ["ct"], output=tmp_path / "out", now=time.time() + LATER)
    assert sorted(c.id for c in found.cases) == ["a", "sub__b"]
    assert found.notes == ("2 files of other kinds ignored",)
    assert [c.id for c in find(source / "a.nii", ["ct"], output=tmp_path / "out", settle=0).cases] == ["a"]


def test_names_that_would_collide_are_told_apart_and_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(
        source / "a.nii",
        source / "a.nii.gz",
        source / "x" / "y.nii",
        source / "x__y.nii",
        source / "_z.nii",
        source / "ä.nii",
    )
    first = ids(source)
    assert len(set(first)) == 6
    assert sum(i.startswith("a-") for i in first) == 2
    assert sum(i.startswith("x__y-") for i in first) == 2
    assert "z" in first
    touch(source / "new.nii")
    assert set(first) < set(ids(source))


def test_numbered_files_are_the_channels_of_a_case(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(*(source / f"p_{i:04d}.nii.gz" for i in range(3)), source / "q_0001.nii.gz")
    cases = {c.id: c for c in find(source, ["t1", "t2"], output=tmp_path / "out", now=time.time() + LATER).cases}
    assert set(cases) == {"p", "q"}
    assert set(cases["p"].files) == {"t1", "t2", "channel_0002"}
    assert set(cases["q"].files) == {"t2"}
    # One role: numbers may count patients, so every file is a case; `_0000` alone is dropped as nnU-Net does.
    assert ids(source) == ["p", "p_0001", "p_0002", "q_0001"]


def test_young_files_wait(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source / "a.nii")
    moment = (source / "a.nii").stat().st_ctime
    young = find(source, ["ct"], output=tmp_path / "out", settle=60, now=moment + 59)
    assert (len(young.cases), young.waiting) == (0, 1)
    assert find(source, ["ct"], output=tmp_path / "out", settle=60, now=moment + 61).waiting == 0
    os.utime(source / "a.nii", (moment + 9e6, moment + 9e6))  # a clock that runs ahead must not make it wait for ever
    assert find(source, ["ct"], output=tmp_path / "out", settle=60, now=moment + 61).waiting == 0


def test_our_own_products_are_no_input(tmp_path: Path, bundle: Bundle) -> None:
    source, output = tmp_path / "in", tmp_path / "in" / "out"
    touch(
        source / "a.nii",
        output / "b.nii",
        source / "elsewhere" / "c_dseg.nii.gz",
        source / "elsewhere" / "d_dseg.nii.gz",
    )
    (source / "old" / state.STATE).mkdir(parents=True)
    touch(source / "old" / "tiny-12345678" / "e.nii")
    maker = json.dumps({"GeneratedBy": [{"Name": "medmamba"}]})
    (source / "elsewhere" / "c_dseg.json").write_text(maker)
    (source / "elsewhere" / "d_dseg.json").write_text("[]")
    assert ids(source, output=output) == ["a", "elsewhere__d_dseg"]
    with pytest.raises(ConfigError, match="folders of their own"):
        ids(source, output=source)


def test_links(tmp_path: Path) -> None:
    source, far = tmp_path / "in", tmp_path / "far"
    touch(source / "a.nii", far / "b.nii", far / "one.nii")
    (source / "link").symlink_to(far)
    (source / "loop").symlink_to(source)
    (source / "self").symlink_to(source / "self")
    (source / "file.nii").symlink_to(far / "one.nii")
    (source / "dead.nii").symlink_to(far / "nowhere.nii")
    assert ids(source) == ["a", "dead", "file"]
    assert ids(source, follow=True) == ["a", "dead", "file", "link__b", "link__one"]
    notes = find(source, ["ct"], output=tmp_path / "out", follow=True).notes
    assert "1 links that lead back into themselves refused" in notes


def test_a_closed_folder_is_set_aside(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    touch(source / "shut" / "a.nii", source / "b.nii")
    listing = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "shut":
            raise PermissionError(13, "closed")
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)  # a test that runs as root can open everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")
    cases = list(find(source, ["ct"], output=tmp_path / "out", settle=0).cases)
    faults = {i.case.id: i.fault.code if i.fault else None for i in plan(cases, bundle, tmp_path / "out").due}
    assert faults == {"b": None, "shut": "permission"}


def test_a_pair_is_one_case_and_both_halves_count(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source / "a.hdr", source / "a.img")
    assert ids(source) == ["a"]
    before = content_hash(source / "a.hdr")
    assert content_hash(source / "a.img") == before
    (source / "a.img").write_bytes(b"other")
    assert content_hash(source / "a.hdr") != before


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_manifest(tmp_path: Path, sign: str) -> None:
    table = tmp_path / "list.csv"
    rows = [
        ["case", "t1", "t2", "group", "date", "age"],
        ["p/1", "a.nii", "b.nii", "g", "2024-01-02", "63"],
        ["p2", "c.nii", "", "", "", ""],
    ]
    table.write_text("\ufeff" + "\n".join(sign.join(row) for row in rows) + "\n\n", encoding="utf-8")
    cases, unused = read_manifest(table, ["t1", "t2"])
    assert unused == ["age"]
    assert [c.id for c in cases] == ["p__1", "p2"]
    assert cases[0].files == {"t1": tmp_path / "a.nii", "t2": tmp_path / "b.nii"}
    assert (cases[0].group, cases[0].dates["t1"], set(cases[1].files)) == ("g", "2024-01-02", {"t1"})


def test_manifest_tells_all_faults_at_once(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("id,ct\na,x.nii\na,y.nii\n,z.nii\nb,\n")
    with pytest.raises(ConfigError, match=r"line 3.*twice.*line 4: no id.*line 5: case 'b' names no file"):
        read_manifest(table, ["ct"])
    table.write_text("name,ct\na,x.nii\n")
    with pytest.raises(ConfigError, match="expected 'case'"):
        read_manifest(table, ["ct"])


def test_a_listed_file_that_is_missing_is_a_fault_until_it_comes(tmp_path: Path, bundle: Bundle) -> None:
    case = Case(id="a", files={"ct": tmp_path / "a.nii"})
    item = plan([case], bundle, tmp_path / "out").due[0]
    assert item.fault is not None
    assert item.fault.code == "missing_file"
    set_aside(case, bundle, tmp_path / "out", "missing_file")
    assert plan([case], bundle, tmp_path / "out").set_aside
    touch(tmp_path / "a.nii")
    assert plan([case], bundle, tmp_path / "out").due[0].fault is None


@pytest.mark.parametrize("products", [PRODUCTS, nnunet.PRODUCTS, "sub-a/anat/sub-a_space-orig_desc-{maker}_{suffix}"])
def test_done_while_the_products_are_whole(products: str, tmp_path: Path, bundle: Bundle) -> None:
    touch(tmp_path / "a.nii")
    case, output = Case(id="a", files={"ct": tmp_path / "a.nii"}, products=products), tmp_path / "out"
    finish(case, bundle, output)
    label = product_path(output, bundle, case, ".nii.gz")
    whole = label.read_bytes()
    assert plan([case], bundle, output).done
    label.write_bytes(whole[:-1])
    assert plan([case], bundle, output).due
    label.write_bytes(b"x" * len(whole))  # the same size: only a full check can tell
    assert plan([case], bundle, output).done
    assert plan([case], bundle, output, verify=True).due
    label.unlink()
    assert plan([case], bundle, output).due
    label.write_bytes(whole)
    (tmp_path / "a.nii").write_bytes(b"another image")
    assert plan([case], bundle, output).due


def test_products_that_a_dead_process_was_replacing_are_not_trusted(tmp_path: Path, bundle: Bundle) -> None:
    touch(tmp_path / "a.nii")
    case, output = Case(id="a", files={"ct": tmp_path / "a.nii"}), tmp_path / "out"
    report = finish(case, bundle, output)
    begin_attempt(output, bundle.title, "a", report.key)  # died after the report: nothing is lost
    assert plan([case], bundle, output).done
    begin_attempt(output, bundle.title, "a", "key of other contents")
    assert plan([case], bundle, output).due


def test_result_version_makes_done_cases_due(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.nii")
    case, output = Case(id="a", files={"ct": tmp_path / "a.nii"}), tmp_path / "out"
    finish(case, bundle, output)
    monkeypatch.setattr("pipelines.report.RESULT_VERSION", 999)
    assert plan([case], bundle, output).due


def test_set_aside_until_contents_change_or_it_is_asked_for(tmp_path: Path, bundle: Bundle) -> None:
    touch(tmp_path / "a.nii")
    case, output = Case(id="a", files={"ct": tmp_path / "a.nii"}), tmp_path / "out"
    set_aside(case, bundle, output)
    assert plan([case], bundle, output).set_aside[0].report is not None
    assert plan([case], bundle, output, retry="too_large").set_aside
    assert plan([case], bundle, output, retry="corrupt_file").due
    assert plan([case], bundle, output, retry="all").due
    with pytest.raises(ConfigError, match="known: all"):
        plan([case], bundle, output, retry="no_such_code")
    assert plan([case], replace(bundle, task={**bundle.task, "new": 1}), output).due
    (tmp_path / "a.nii").write_bytes(b"copied again")
    assert plan([case], bundle, output).due


@pytest.mark.parametrize("products", [PRODUCTS, "sub-a/anat/sub-a_space-orig_desc-{maker}_{suffix}"])
def test_outdated_cases_are_due_only_on_request(products: str, tmp_path: Path, bundle: Bundle) -> None:
    touch(tmp_path / "a.nii")
    case, output = Case(id="a", files={"ct": tmp_path / "a.nii"}, products=products), tmp_path / "out"
    finish(case, bundle, output)
    newer = replace(bundle, task={**bundle.task, "new": 1})
    assert plan([case], newer, output).outdated
    assert plan([case], newer, output, reprocess=True).due
    assert plan([case], bundle, output, reprocess=True).done
    other = replace(newer, name="another")
    assert plan([case], other, output).due
    (tmp_path / "a.nii").write_bytes(b"another image")
    assert plan([case], newer, output).due


def test_the_index_spares_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.nii")
    read: list[Path] = []

    def reading(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(state, "hash_file", reading)
    for reread in (False, False, True):
        with Index(tmp_path / "out") as index:
            assert index.hash(tmp_path / "a.nii", reread=reread) == hash_file(tmp_path / "a.nii")
    assert len(read) == 2
    (tmp_path / "a.nii").write_bytes(b"longer than it was before, by far and away")
    with Index(tmp_path / "out") as index:
        assert index.hash(tmp_path / "a.nii") == hash_file(tmp_path / "a.nii")
    (tmp_path / "out" / state.STATE / "index.sqlite").write_bytes(b"damaged" * 1000)
    with Index(tmp_path / "out") as index:
        assert index.hash(tmp_path / "a.nii") == hash_file(tmp_path / "a.nii")


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass
    place = tmp_path / state.STATE / "lock"
    place.write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1}))  # dead: its number is above pid_max
    with lock(tmp_path):
        pass
    place.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(ConfigError, match="host elsewhere"), lock(tmp_path):
        pass
