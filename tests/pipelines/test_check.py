"""Faults of a data set told at once, and a batch told before it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from medmamba.bundle import Bundle
from pipelines.cases.archive import find
from pipelines.cases.check import check_dataset
from pipelines.report import Report
from pipelines.serving.forecast import describe, forecast
from pipelines.serving.products import product_path
from tests.pipelines.cohort_maker import write_cohort, write_nifti
from tests.ways.tiny import make_bundle, write_volume

GIB = 1 << 30


def test_a_sound_table_has_no_fault(tmp_path: Path) -> None:
    assert check_dataset(write_cohort(tmp_path, cases=4, size=8)) == (4, [])


def test_every_fault_of_a_data_set_is_told(tmp_path: Path) -> None:
    place = tmp_path / "Dataset001_X"
    source = write_cohort(tmp_path / "plain", cases=5, size=8).parent
    for i in range(5):
        for folder, name in (("imagesTr", f"c{i}_0000.nii.gz"), ("labelsTr", f"c{i}.nii.gz")):
            (place / folder).mkdir(parents=True, exist_ok=True)
            kind = "t1" if folder == "imagesTr" else "dseg"
            shutil.copyfile(source / f"c{i}_{kind}.nii.gz", place / folder / name)
    values = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "bright": 3}, "file_ending": ".nii.gz"}
    (place / "dataset.json").write_text(json.dumps(values))
    folds = [{"train": ["c1", "c2", "c3", "c4"], "val": ["c0", "c9"]}]
    (place / "splits_final.json").write_text(json.dumps(folds))
    shutil.copyfile(place / "imagesTr" / "c0_0000.nii.gz", place / "imagesTr" / "c1_0000.nii.gz")
    write_nifti(place / "labelsTr" / "c2.nii.gz", np.zeros((8, 8, 8), np.uint8), np.diag([9.0, 9, 9, 1]))
    (place / "labelsTr" / "c3.nii.gz").unlink()
    (place / "imagesTr" / "c4_0000.nii.gz").write_bytes(b"")
    count, faults = check_dataset(place)
    text = "\n".join(faults)
    assert count == 5
    for part in (
        "values [7] that the run file does not list", "'c0' and 'c1' of two patients have the same 'T1' image",
        "['train', 'validation']: a leak", "'c2': grids differ", "c3.nii.gz: no such file", "c4_0000.nii.gz: 0 bytes",
        "fold 0: case 'c9' is not in the data set",
    ):  # fmt: skip
        assert part in text, part
    told = CliRunner().invoke(app, ["check", str(place)])
    assert told.exit_code == 1
    assert f"5 cases, {len(faults)} faults" in told.output


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def test_a_batch_is_told_before_it_runs(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights: the builder of networks is never asked."""
    monkeypatch.setattr(Bundle, "build", lambda *_: pytest.fail("weights were loaded"))
    for i in range(3):
        write_volume(tmp_path / "in" / f"good{i}.nii.gz", i)
    (tmp_path / "in" / "empty.nii.gz").touch()
    write_nifti(tmp_path / "in" / "four.nii", np.ones((4, 4, 4, 2), np.int16), np.eye(4))
    cases = find(tmp_path / "in", ["ct"], output=tmp_path / "out", settle=0).cases
    told = forecast(cases, bundle, tmp_path / "out", memory=GIB)
    assert {c.case: c.code for c in told.refused} == {"empty": "corrupt_file", "four": "wrong_channels"}
    assert (told.seconds, told.disk) == (None, 3 * 6 * 12**3)
    assert told.peak > 12 * 12**3
    for case in cases[:2]:
        path = product_path(tmp_path / "out", bundle, case, ".json")
        report = Report(
            case=case.id, key="k", status="done", bundle={}, inputs={}, outputs={"x": {"size": 100}},
            grid={"shape": [10, 10, 10]}, run={"seconds": 2.0},
        )  # fmt: skip
        report.save(path)
    again = forecast(cases, bundle, tmp_path / "out", memory=GIB)
    assert again.seconds == pytest.approx(2.0 * 3 * 12**3 / 1000)
    assert again.disk == round(0.1 * 3 * 12**3)
    assert "3 can run, 2 will be refused" in describe(again)[0]
    assert {c.code for c in forecast(cases, bundle, tmp_path / "out", memory=1000).refused} >= {"too_large"}
    shown = CliRunner().invoke(
        app, ["plan", str(tmp_path / "in"), "--bundle", str(bundle.folder), "--output", str(tmp_path / "out")]
    )
    assert shown.exit_code == 0, shown.output
    assert "empty: corrupt_file" in shown.output
