"""Manifests: every fault at once; groups are never torn; the split is the seed's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medmamba.errors import ConfigError
from pipelines.cases import cohort
from pipelines.cases.manifest import read_rows
from tests.pipelines.cohort_maker import LABELS, write_cohort, write_nifti


def test_csv_and_json_give_the_same_cases(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path, cases=3, size=8)
    rows = read_rows(manifest)
    (tmp_path / "m.json").write_text(json.dumps({"cases": rows}))
    cases = cohort.read(manifest, ["t1"], labels=tuple(LABELS))
    (tmp_path / "m.csv").write_text(manifest.read_text().replace(",", ";"))
    for other in ("m.json", "m.csv"):
        assert cases == cohort.read(tmp_path / other, ["t1"], labels=tuple(LABELS))
    assert [(c.case.id, c.case.group) for c in cases] == [("c0", "p0"), ("c1", "p0"), ("c2", "p1")]


def test_every_fault_is_listed(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path, cases=4, size=8)
    label = np.zeros((8, 8, 8), dtype=np.uint8)
    label[0, 0, 0] = 9
    write_nifti(tmp_path / "nine.nii.gz", label, np.diag([1.5, 1.5, 1.5, 1]))
    write_nifti(tmp_path / "moved.nii.gz", label * 0, np.diag([1.5, 1.5, -1.5, 1]))
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "c1_t1.nii.gz").read_bytes()[:60])
    with manifest.open("a") as file:
        file.write("c0,p0,c0_t1.nii.gz,c0_dseg.nii.gz\n")  # twice
        file.write("d0,q,gone.nii.gz,nine.nii.gz\n")  # image missing, label value not listed
        file.write("d1,q,c0_t1.nii.gz,moved.nii.gz\n")  # flipped label grid
        file.write("d2,q,cut.nii.gz,c0_dseg.nii.gz\n")  # damaged image
        file.write("d3,q,,c0_dseg.nii.gz\n")  # no image
        file.write("d/4,q,c0_t1.nii.gz,c0_dseg.nii.gz\n")  # unsafe id
    with pytest.raises(ConfigError) as told:
        cohort.read(manifest, ["t1"], labels=tuple(LABELS))
    text = str(told.value)
    for part in (
        "7 faults", "'c0' stands 2 times", "gone.nii.gz: no such file", "label values [9]", "'d1': grids differ",
        "cut.nii.gz", "row 9 (d3): columns ['t1']", "'d/4' is not safe",
    ):  # fmt: skip
        assert part in text


def test_split_keeps_groups_whole_and_follows_the_seed(tmp_path: Path) -> None:
    cases = cohort.read(write_cohort(tmp_path, cases=10, size=8), ["t1"])
    splits = [cohort.split(cases, validation_share=0.4, seed=s) for s in range(6)]
    for one in splits:
        assert not {c.case.group for c in one.train} & {c.case.group for c in one.validation}
        assert len({c.case.group for c in one.validation}) == 2  # 0.4 of 5 patients
        assert {c.case.id for c in (*one.train, *one.validation)} == {c.case.id for c in cases}
    turned = cohort.split(tuple(reversed(cases)), validation_share=0.4, seed=0)
    ids = [{c.case.id for c in s.validation} for s in (turned, splits[0])]
    assert ids[0] == ids[1]  # the order of the rows does not matter
    assert len({tuple(c.case.id for c in s.validation) for s in splits}) > 1


def test_split_column_rules_and_test_cases_are_left_out(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path, cases=3, size=8)
    lines = manifest.read_text().splitlines()
    parts = ["split", "train", "train", "test"]
    manifest.write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)))
    parted = cohort.split(cohort.read(manifest, ["t1"]), validation_share=0.5, seed=0)
    assert [c.case.id for c in parted.train] == ["c0", "c1"]
    assert parted.validation == ()
    torn = ["split", "train", "validation", "test"]
    manifest.write_text("\n".join(f"{a},{b}" for a, b in zip(lines, torn, strict=True)))
    with pytest.raises(ConfigError, match=r"group 'p0' stands in \['train', 'validation'\]"):
        cohort.read(manifest, ["t1"])


def test_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    cases = cohort.read(write_cohort(tmp_path, cases=1, size=8), ["t1"])
    with pytest.raises(ConfigError, match="none left to train on"):
        cohort.split(cases, validation_share=0.5, seed=0)
    (tmp_path / "empty.csv").write_text("case,t1,label\n")
    with pytest.raises(ConfigError, match="no case in it"):
        cohort.read(tmp_path / "empty.csv", ["t1"])
