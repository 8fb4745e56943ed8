"""DICOM in -> DICOM SEG out: from a folder of slices to labels that lie on them, twice the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows import batch
from flows.batch import ASIDE, WELL, run_batch
from flows.cli import app
from flows.work import run_in_order
from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from medmamba.formats.dicom import DicomSource
from medmamba.formats.dicom_seg import read_seg
from medmamba.formats.nifti import read_labels
from pipelines.cases.archive import find
from pipelines.cases.case import Case
from pipelines.cases.contents import content_hash
from pipelines.serving.dicom_out import label_codes
from pipelines.serving.predict import Predictor, predict
from tests.medmamba.formats.dicom_maker import save, series, values, zipped
from tests.ways.tiny import make_bundle, write_volume

CODE = {"type": ["SCT", "10200004", "Liver"]}


def coded_bundle(folder: Path) -> Bundle:
    make_bundle(folder)
    path = folder / "bundle.json"
    described = json.loads(path.read_text())
    described["task"] |= {"values": {"1": 5, "2": 9}, "codes": {"1": CODE}}
    path.write_text(json.dumps(described))
    return Bundle.load(folder)


@pytest.mark.parametrize("lean", [0.0, 12.0])
def test_a_series_becomes_a_segmentation_twice_the_same(lean: float, tmp_path: Path) -> None:
    bundle = coded_bundle(tmp_path / "bundle")
    folder = save(tmp_path / "ct", series(14, lean=lean))
    products: list[dict[str, bytes]] = []
    for output in (tmp_path / "a", tmp_path / "b"):
        report = predict(Predictor.load(bundle), Case(id="ct", files={"ct": folder}), output)
        assert list(report.outputs) == ["ct_dseg.nii.gz", "ct_dseg.dcm", "ct_dseg.png"]
        products.append({n: (output / bundle.title / n).read_bytes() for n in report.outputs})
        assert any("gantry_tilt: the slices lean 12.00" in w for w in report.warnings) == (lean > 0)
    assert products[0] == products[1]
    made = tmp_path / "a" / bundle.title
    source = DicomSource(folder)
    labels, grid = read_labels(made / "ct_dseg.nii.gz")
    assert grid.matches(source.grid)  # NIfTI keeps float32
    assert set(np.unique(labels)) - {0}, "the tiny network gives labels, else nothing is tested"
    again, alone = read_seg(made / "ct_dseg.dcm")
    assert np.array_equal(again, labels)
    assert alone.matches(source.grid)


def test_binary_and_none_on_request(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    case = Case(id="ct", files={"ct": save(tmp_path / "ct", series(12))})
    made = tmp_path / "out" / bundle.title / "ct_dseg.dcm"
    predict(Predictor.load(bundle, dicom_seg="binary"), case, tmp_path / "out")
    labels, _ = read_labels(made.with_name("ct_dseg.nii.gz"))
    assert np.array_equal(read_seg(made, DicomSource(case.files["ct"]).grid)[0], labels)
    report = predict(Predictor.load(bundle, dicom_seg="none"), case, tmp_path / "out")
    assert not made.exists()
    assert "ct_dseg.dcm" not in report.outputs
    with pytest.raises(ConfigError, match="known: labelmap, binary, none"):
        Predictor.load(bundle, dicom_seg="fractional")


def test_headers_that_allow_no_segmentation_cost_only_that(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    folder = save(tmp_path / "ct", series(12, FrameOfReferenceUID=None))
    report = predict(Predictor.load(bundle), Case(id="ct", files={"ct": folder}), tmp_path / "out")
    assert list(report.outputs) == ["ct_dseg.nii.gz", "ct_dseg.png"]
    assert any("no DICOM SEG" in w for w in report.warnings)


class Archive:
    """Two series and a damaged one in one study, a zip, a NIfTI."""

    def __init__(self, root: Path) -> None:
        self.input, self.output = root / "in", root / "out"
        self.bundle = make_bundle(root / "bundle")
        save(self.input / "p1" / "study", [*series(12, uid="1.2.1"), *series(13, uid="1.2.2")])
        save(self.input / "p2" / "ct", series(12, uid="1.2.3"))
        broken = series(12, uid="1.2.4")
        del broken[5]
        save(self.input / "p3", broken)
        zipped(save(root / "packed", series(12, uid="1.2.5")), self.input / "p4.zip")
        write_volume(self.input / "p5.nii.gz")
        (self.input / "p2" / "notes.txt").write_text("no image")

    def run(self, **options: Any) -> int:
        asked = {"input": self.input, "bundle": str(self.bundle.folder), "output": self.output, "settle": 0, **options}
        return run_batch(echo=lambda _: None, runner=run_in_order, **asked)

    @property
    def folder(self) -> Path:
        return self.output / self.bundle.title


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)
    return Archive(tmp_path)


def test_one_case_a_series_in_a_batch(archive: Archive) -> None:
    assert archive.run() == ASIDE
    made = sorted(p.name.removesuffix("_dseg.dcm") for p in archive.folder.glob("*_dseg.dcm"))
    assert made == ["p1__study__series-1.2.1", "p1__study__series-1.2.2", "p2__ct", "p4"]
    assert (archive.folder / "p5_dseg.nii.gz").exists()
    record = json.loads((archive.folder / "set_aside" / "p3.json").read_text())
    assert (record["code"], "after slice 5" in record["message"]) == ("missing_slice", True)
    before = {p: p.stat().st_mtime_ns for p in archive.folder.rglob("*")}
    assert archive.run() == ASIDE
    assert {p: p.stat().st_mtime_ns for p in archive.folder.rglob("*")} == before
    healed = series(12, uid="1.2.4")[5]
    save(archive.input / "p3", [healed], "healed{}".format)
    assert archive.run() == WELL
    ours = archive.input / "p2" / "ct" / "seg.dcm"  # our own segmentation in the archive is no case
    ours.write_bytes((archive.folder / "p2__ct_dseg.dcm").read_bytes())
    found = find(archive.input, ("ct",), output=archive.output, settle=0)
    assert sorted(c.id for c in found.cases) == [*made[:3], "p3", "p4", "p5"]


def test_the_command_takes_a_study(archive: Archive) -> None:
    for name in ("p4.zip", "p5.nii.gz"):
        (archive.input / name).unlink()
    asked = ["predict", str(archive.input), "--bundle", str(archive.bundle.folder), "--output", str(archive.output)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 3, result.output
    assert "p3: missing_slice:" in result.output
    assert "p1__study__series-1.2.2_dseg.dcm" in result.output
    alone = CliRunner().invoke(app, [*asked[:1], str(archive.input / "p2" / "ct"), *asked[2:], "--dicom-seg", "binary"])
    assert alone.exit_code == 0, alone.output
    assert "ct_dseg.dcm" in alone.output
    with pytest.raises(InputError, match="slices are missing"):
        CliRunner().invoke(app, [*asked[:1], str(archive.input / "p3"), *asked[2:]], catch_exceptions=False)
    (archive.input / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        CliRunner().invoke(app, [*asked[:1], str(archive.input / "none"), *asked[2:]], catch_exceptions=False)


def test_the_contents_of_a_series_do_not_depend_on_names(tmp_path: Path) -> None:
    a = save(tmp_path / "a", series(3))
    b = save(tmp_path / "b", series(3)[::-1], "x{}.dcm".format)
    assert content_hash(a) == content_hash(b)
    save(tmp_path / "c", series(3, array=values(3, seed=1)))
    assert content_hash(tmp_path / "c") != content_hash(a)
    two = zipped(save(tmp_path / "two", [*series(3, uid="1.1"), *series(3, uid="1.2")]), tmp_path / "two.zip")
    assert content_hash(two / "series=1.1") != content_hash(two / "series=1.2")


def test_codes_belong_to_written_values() -> None:
    task = {"labels": {"1": "liver"}, "values": {"1": 5}, "codes": {"1": CODE}}
    assert label_codes(task) == {5: {"type": ("SCT", "10200004", "Liver")}}
    with pytest.raises(ConfigError, match="scheme, value, meaning"):
        label_codes({"codes": {"1": {"type": ["SCT", "10200004"]}}})
