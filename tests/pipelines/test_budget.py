"""Windows at once from the budget: as many as fit, no more than it chooses ever, and what the command does with it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from pipelines.cases.case import Case
from pipelines.report import Report
from pipelines.serving.budget import MOST_WINDOWS, fitting_batch, predicted_bytes, window_bytes
from tests.ways.tiny import make_bundle, write_volume


def test_the_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    needed = predicted_bytes(bundle, Case(id="a", files={"ct": write_volume(tmp_path / "a.nii.gz", size=30)}))
    one = window_bytes(bundle)
    assert one > 2 * 4 * 12**3
    for batch in (1, 2, MOST_WINDOWS):
        assert fitting_batch(bundle, needed, needed + (batch - 1) * one) == batch
        assert fitting_batch(bundle, needed, needed + batch * one - 1) == batch
    assert fitting_batch(bundle, needed, needed - 1) == 1  # refused elsewhere
    assert fitting_batch(bundle, needed, 1000 * needed) == MOST_WINDOWS


@pytest.mark.parametrize(("options", "batch"), [([], MOST_WINDOWS), (["--batch-size", "3"], 3), (["--ram", "fits"], 2)])
def test_predict_tells_the_batch_it_took(tmp_path: Path, options: list[str], batch: int) -> None:
    bundle, path = make_bundle(tmp_path / "bundle"), write_volume(tmp_path / "a.nii.gz", size=30)
    needed = predicted_bytes(bundle, Case(id="a", files={"ct": path})) + window_bytes(bundle)
    said = [str(needed) if word == "fits" else word for word in options]
    asked = ["predict", str(path), "--bundle", str(bundle.folder), "--output", str(tmp_path / "out"), *said]
    done = CliRunner().invoke(app, [*asked, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    report = Report.load(tmp_path / "out" / bundle.title / "a_dseg.json")
    assert report is not None
    assert report.run["batch"] == batch


def test_predict_refuses_what_does_not_fit(tmp_path: Path) -> None:
    bundle, path = make_bundle(tmp_path / "bundle"), write_volume(tmp_path / "a.nii.gz", size=30)
    asked = ["predict", str(path), "--bundle", str(bundle.folder), "--output", str(tmp_path / "out"), "--ram", "1K"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code != 0
    assert "raise --ram" in f"{done.output}{done.exception}"
