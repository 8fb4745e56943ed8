"""The interpolation ceiling against a figure measured elsewhere, and where it must be exactly 1."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source
from pipelines.config import TrainRun
from pipelines.learning.ceiling import interpolation_ceiling, round_trip
from pipelines.learning.train import train
from pipelines.serving.predict import Predictor, predict
from tests.pipelines.cohort_maker import run_values, write_cohort


def contract(spacing: tuple[float, float, float] | None) -> Preprocessing:
    return Preprocessing(
        channels=(Channel(role="ct"),), windowing=Windowing(size=(8, 8, 8), overlap=(0, 0, 0)), spacing=spacing
    )


def ellipsoid(path: Path) -> Path:
    """Half-axes of 20, 22 and 9 voxels at 0.7 x 0.9 x 2.5 mm, value 7; a block of value 2 beside it."""
    x, y, z = np.indices((50, 54, 26)) - np.array([22, 24, 12]).reshape(3, 1, 1, 1)
    labels = 7 * ((x / 20) ** 2 + (y / 22) ** 2 + (z / 9) ** 2 <= 1).astype(np.uint8)
    labels[45:, :, :5] = 2
    nib.save(nib.Nifti1Image(labels, np.diag([0.7, -0.9, 2.5, 1])), path)
    return path


def test_the_loss_of_a_round_trip_is_the_one_known(tmp_path: Path) -> None:
    """Through 1.5 mm an ideal prediction of this ellipsoid was measured at Dice 0.980 by another library."""
    path = ellipsoid(tmp_path / "e.nii.gz")
    found = interpolation_ceiling([path, path], contract((1.5, 1.5, 1.5)), {7: "organ", 2: "block", 9: "absent"})
    assert found["7"]["dice"] == pytest.approx(0.980, abs=0.01)
    assert found["7"]["n"] == 2
    assert set(found) == {"7", "2"}
    coarse = interpolation_ceiling([path], contract((5.0, 5.0, 5.0)), {7: "organ"})
    assert coarse["7"]["dice"] < found["7"]["dice"]


def test_without_resampling_nothing_is_lost(tmp_path: Path) -> None:
    source = open_source(ellipsoid(tmp_path / "e.nii.gz"))
    again = round_trip(source, contract(None), (7,))
    truth = np.asarray(nib.load(tmp_path / "e.nii.gz").dataobj).T
    assert np.array_equal(again, np.where(truth == 7, 7, 0))  # a value that is not listed is background


def test_training_puts_it_on_the_card_and_prediction_in_the_report(tmp_path: Path) -> None:
    values = run_values(write_cohort(tmp_path, cases=2, size=12), tmp_path / "run", epochs=1, steps_per_epoch=1)
    values["preprocessing"]["spacing_mm"] = [2.0, 2.0, 2.0]
    values["network"] = {"widths": [2, 4], "depths": [1, 1], "state": 1, "mixer": "none"}
    bundle = train(TrainRun.check({**values, "validation_share": 0.0}))
    ceiling = bundle.card["interpolation_ceiling"]
    assert {v["name"] for v in ceiling.values()} == {"bright", "dim"}
    assert all(0.5 < v["lowest"] <= v["dice"] <= 1 for v in ceiling.values())
    case = Case(id="c0", files={"t1": tmp_path / "c0_t1.nii.gz"})
    report = predict(Predictor.load(bundle, device="cpu"), case, tmp_path / "out")
    assert report.numbers["interpolation_ceiling"] == ceiling
