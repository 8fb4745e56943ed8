"""Evaluation: grids before scores, every reference answered, means with their n, files that can be read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from medmamba.errors import ConfigError, GeometryError
from pipelines.scoring.evaluate import evaluate, format_table
from tests.pipelines.cohort_maker import LABELS, write_cohort, write_nifti

MM = np.diag([2.0, 1.0, 1.0, 1.0])


def box(*corner: int, value: int = 1, size: int = 3) -> np.ndarray:
    array = np.zeros((10, 8, 6), dtype=np.uint8)
    if corner:
        array[tuple(slice(c, c + size) for c in corner)] = value
    return array


def test_a_perfect_prediction_scores_one(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path, cases=3, size=10)
    result = evaluate(manifest, tmp_path, labels=LABELS)
    for summary in result.summary():
        assert (summary["dice"], summary["nsd"], summary["hd95_mm"], summary["n"]) == (1.0, 1.0, 0.0, 3)
    assert result.mean() == 1.0


def test_the_four_kinds_are_counted_and_no_case_is_lost(tmp_path: Path) -> None:
    truth = {"tp": box(1, 1, 1), "fn": box(1, 1, 1), "fp": box(), "tn": box()}
    found = {"tp": box(2, 1, 1), "fn": box(), "fp": box(1, 1, 1), "tn": box()}
    for name in truth:
        write_nifti(tmp_path / "ref" / f"{name}_dseg.nii.gz", truth[name], MM)
        write_nifti(tmp_path / "pred" / "model-1" / f"{name}_dseg.nii.gz", found[name], MM)
    result = evaluate(tmp_path / "ref", tmp_path / "pred", labels={1: "box"}, output=tmp_path / "out")
    summary = result.summary()[0]
    assert {k: summary[k] for k in ("TP", "FP", "FN", "TN")} == {"TP": 1, "FP": 1, "FN": 1, "TN": 1}
    assert (summary["cases"], summary["n"], summary["hd95_flagged"]) == (4, 3, 2)
    overlap = 2 / 3  # 3^3 boxes one cell apart
    assert summary["dice"] == pytest.approx(overlap / 3)
    assert summary["dice_all"] == pytest.approx((overlap + 1) / 4)
    length = np.linalg.norm([9 * 2.0, 7.0, 5.0])
    assert summary["hd95_mm"] == pytest.approx((2 * length + 2.0) / 3)  # one cell along x is 2 mm
    low, high = summary["dice_95"]
    assert low == 0.0
    assert high <= overlap + 1e-9
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert told["labels"][0]["dice"] == summary["dice"]
    with (tmp_path / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["kind"]) for r in rows] == [("fn", "FN"), ("fp", "FP"), ("tn", "TN"), ("tp", "TP")]
    assert rows[2]["hd95_mm"] == ""  # undefined, not 0
    table = format_table(result)
    assert "1/1/1/1" in table
    assert "NSD at 2 mm" in table


def test_cells_of_the_ignore_label_are_left_out(tmp_path: Path) -> None:
    truth, found = box(1, 1, 1), box(1, 1, 1)
    truth[6:] = 9
    found[6:] = 1
    write_nifti(tmp_path / "ref" / "a_dseg.nii.gz", truth, MM)
    write_nifti(tmp_path / "pred" / "a_dseg.nii.gz", found, MM)
    assert evaluate(tmp_path / "ref", tmp_path / "pred", ignore=9).mean() == 1.0
    assert evaluate(tmp_path / "ref", tmp_path / "pred").mean() < 0.5


@pytest.mark.parametrize(
    "affine",
    [np.diag([-2.0, 1, 1, 1]), np.diag([4.0, 1, 1, 1]), MM + np.eye(4, k=3) * 2.0],
    ids=["flipped", "thicker", "moved"],
)
def test_equal_arrays_on_other_grids_are_an_error_not_one(tmp_path: Path, affine: np.ndarray) -> None:
    write_nifti(tmp_path / "ref/a.nii.gz", box(1, 1, 1), MM)
    write_nifti(tmp_path / "pred/a.nii.gz", box(1, 1, 1), affine)
    with pytest.raises(GeometryError, match=r"a\.nii\.gz lies on another grid than"):
        evaluate(tmp_path / "ref", tmp_path / "pred")


def test_missing_and_doubled_predictions_are_listed(tmp_path: Path) -> None:
    for name in "abc":
        write_nifti(tmp_path / f"ref/{name}.nii.gz", box(1, 1, 1), MM)
    for place in ("b.nii.gz", "x/c.nii.gz", "y/c_dseg.nii.gz"):
        write_nifti(tmp_path / "pred" / place, box(1, 1, 1), MM)
    with pytest.raises(ConfigError) as told:
        evaluate(tmp_path / "ref", tmp_path / "pred")
    assert "2 references without exactly one prediction" in str(told.value)
    assert "a: none" in str(told.value)
    assert "c: 2 predictions" in str(told.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no reference label files"):
        evaluate(tmp_path / "empty", tmp_path / "pred")


def test_values_outside_the_labels_are_told(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ref/a.nii.gz", box(1, 1, 1), MM)
    write_nifti(tmp_path / "pred/a.nii.gz", box(1, 1, 1) + box(5, 5, 3, value=4), MM)
    result = evaluate(tmp_path / "ref", tmp_path / "pred", labels={1: "box"})
    assert result.mean() == 1.0
    assert result.warnings == ("case a: predicted values [4] are not among the labels and were not scored",)
    assert [s["label"] for s in evaluate(tmp_path / "ref", tmp_path / "pred").summary()] == [1, 4]  # by default all


def test_products_named_after_the_image_are_found_through_the_manifest(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ref/truth_1.nii.gz", box(1, 1, 1), MM)
    write_nifti(tmp_path / "pred/scan_1_dseg.nii.gz", box(1, 1, 1), MM)
    (tmp_path / "ref/m.csv").write_text("case,group,t1,label\none,g,scan_1.nii.gz,truth_1.nii.gz\n")
    assert evaluate(tmp_path / "ref/m.csv", tmp_path / "pred").rows[0].case == "one"
