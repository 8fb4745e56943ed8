"""A result against the training cohort: volumes by their logarithm, pieces, and labels that were not found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.learning.expected import compare, expected, spread_of, volume_z
from pipelines.pages.report import judge
from pipelines.report import Report
from tests.pipelines.cohort_maker import write_nifti


def labels(organ: int, parts: int = 1) -> np.ndarray:
    """Label 4 of `organ` cells in a row, and `parts - 1` single cells of it far away."""
    array = np.zeros((40, 8, 8), np.uint8)
    array[: organ - parts + 1, 0, 0] = 4
    array[: 3 * (parts - 1) : 3, 4, 4] = 4
    return array


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Volumes of 10..14 ml of label 4 in one or two pieces; label 9 in one case of five."""
    made = []
    for number, organ in enumerate((10, 11, 12, 13, 14)):
        array = labels(organ, 2 if number == 0 else 1)
        array[-1, -1, -1] = 9 if number == 1 else 0
        made.append(write_nifti(tmp_path / f"{number}.nii.gz", array, np.diag([10.0, 10.0, 10.0, 1.0])))
    return made


def row(array: np.ndarray, value: int, name: str) -> dict[str, Any]:
    voxels = int((array == value).sum())
    return {"name": name, "voxels": voxels, "volume_ml": float(voxels), "truncated": False}


def result(array: np.ndarray, known: dict[str, Any]) -> Report:
    rows = {"4": row(array, 4, "organ"), "9": row(array, 9, "tumour")}
    compare(rows, array, known)
    return Report(case="a", key="k", status="done", bundle={}, inputs={}, numbers={"labels": rows})


def test_a_cohort_is_told_by_median_and_robust_spread(files: list[Path]) -> None:
    known = expected(files, {4: "organ", 9: "tumour", 5: "absent"})
    assert known["4"]["n"] == known["4"]["cases"] == 5
    assert known["4"]["median_ml"] == pytest.approx(12)
    assert known["4"]["spread"] == pytest.approx(1.4826 * math.log(12 / 11))  # the third of the five distances
    assert known["4"]["pieces"] == 2
    assert (known["9"]["n"], known["5"]["n"], known["5"]["median_ml"]) == (1, 0, None)
    assert spread_of([7.0] * 9)["spread"] == 0.05


def test_z_is_how_many_spreads_away(files: list[Path]) -> None:
    known = expected(files, {4: "organ"})["4"]
    assert volume_z(12.0, known) == pytest.approx(0)
    assert volume_z(12.0 * math.exp(3 * known["spread"]), known) == pytest.approx(3)
    assert volume_z(0.0, known) is None
    assert volume_z(12.0, {**known, "n": 4}) is None


def test_one_case_alone_is_judged_by_the_training_cohort(files: list[Path]) -> None:
    known = expected(files, {4: "organ", 9: "tumour"})
    usual = judge([result(labels(12), known)])[0]
    assert usual.points == pytest.approx(0)  # the tumour that most training cases lack is not missed
    large = judge([result(labels(38), known)])[0]
    assert large.points > 5
    assert "organ is unusually large" in large.reasons[0]
    torn = judge([result(labels(12, parts=3), known)])[0]
    assert torn.reasons == ("organ lies in 3 pieces, in training at most in 2",)
    missed = labels(12)
    missed[missed == 4] = 9
    assert "organ was not found, most training cases have it" in judge([result(missed, known)])[0].reasons


def test_the_training_cohort_counts_more_than_the_run(files: list[Path]) -> None:
    """A whole run of results three times too large: among themselves they look alike."""
    known = expected(files, {4: "organ", 9: "tumour"})
    run = [result(labels(36), known) for _ in range(6)]
    assert min(s.points for s in judge(run)) > 5


def test_a_cohort_of_few_cases_says_nothing(files: list[Path]) -> None:
    numbers = result(labels(38), expected(files[:3], {4: "organ"})).numbers["labels"]["4"]
    assert "volume_z" not in numbers
