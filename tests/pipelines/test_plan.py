"""Planning: the rules on figures worked out by hand, folds that keep patients and spread sites, a file that trains."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import ConfigError
from pipelines.cases import cohort
from pipelines.cases.case import Case
from pipelines.cases.cohort import LabelledCase
from pipelines.cases.fingerprint import RoleFacts, fingerprint
from pipelines.config import TrainRun
from pipelines.learning.plan import channel, fitting, make_folds, patch_shape, plan_cohort, target_spacing
from tests.pipelines.cohort_maker import write_cohort, write_nifti

GIB = 1 << 30


def test_spacing_is_the_median_and_thin_stacks_are_not_blown_up() -> None:
    even = np.array([[1.0, 0.8, 0.8], [1.2, 0.8, 0.8], [5.0, 0.8, 0.8]])
    assert target_spacing(even, np.array([[100, 200, 200]] * 3)) == (1.2, 0.8, 0.8)
    coarse = np.array([[10.0, 1, 1], [9, 1, 1], [8, 1, 1], [5, 1, 1]])  # median 8.5, 10th percentile 5.9
    assert target_spacing(coarse, np.array([[20, 300, 300]] * 4)) == pytest.approx((5.9, 1, 1))
    assert target_spacing(coarse, np.array([[200, 300, 300]] * 4)) == (8.5, 1, 1)  # many slices: no thin stack


def test_patch_follows_spacing_and_memory() -> None:
    assert patch_shape((500, 500, 500), (1, 1, 1), lambda p: True) == (256, 256, 256)
    z, y, x = patch_shape((500, 500, 500), (3, 1, 1), lambda p: True)
    assert y == x > 2 * z
    assert patch_shape((40, 500, 500), (1, 1, 1), lambda p: True)[0] == 48  # no more than the image holds
    small = patch_shape((500, 500, 500), (3, 1, 1), lambda p: np.prod(p) <= 64**3)
    assert np.prod(small) <= 64**3 < np.prod([n + 16 for n in small])
    assert all(n % 16 == 0 for n in small)
    with pytest.raises(ConfigError, match="does not fit"):
        patch_shape((64, 64, 64), (1, 1, 1), lambda p: False)


def test_the_house_predicts_what_fits() -> None:
    fits = fitting("mamba_unet", {"widths": [8, 16], "depths": [1, 1]}, channels=1, classes=3, budget=GIB // 8)
    assert fits((16, 16, 16))
    assert not fits((256, 256, 256))


def test_ct_is_clipped_and_has_units_and_mr_is_not() -> None:
    facts = RoleFacts(
        percentile_00_5=-150, median=40, percentile_99_5=250, mean=50, std=80, low=(-1024, -980), high=(300, 976)
    )
    ct = channel("scan", facts)  # by its values
    assert (ct["scaling"], ct["clip"], ct["shift"], ct["scale"]) == ("fixed", [-150, 250], 50, 80)
    assert ct["low_between"] == [-1524, -480]  # widened by a quarter of 2000
    assert channel("t1", replace(facts, low=(0, 3))) == {"scaling": "zscore"}
    assert channel("CT", replace(facts, low=(0, 3)))["scaling"] == "fixed"  # by its name


def labelled(group: str, number: int, site: str) -> LabelledCase:
    case = Case(id=f"{group}-{number}", files={"t1": Path("x")}, group=group)
    return LabelledCase(case=case, label=Path("y"), site=site)


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("abc")), min_size=4, max_size=30), st.integers(0, 99))
def test_folds_hold_every_case_once_and_tear_no_patient(groups: list[tuple[int, str]], seed: int) -> None:
    cases = [labelled(f"p{g}", i, site) for g, (n, site) in enumerate(groups) for i in range(n)]
    folds = make_folds(cases, 4, seed=seed)
    assert sorted(c for fold in folds for c in fold) == sorted(c.case.id for c in cases)
    assert all(folds)
    homes = {c: k for k, fold in enumerate(folds) for c in fold}
    assert all(len({homes[c.case.id] for c in cases if c.case.group == g}) == 1 for g in {c.case.group for c in cases})
    assert folds == make_folds(list(reversed(cases)), 4, seed=seed)


def test_folds_spread_sites_evenly() -> None:
    cases = [labelled(f"p{i}", 0, "big" if i < 20 else "small") for i in range(25)]
    for fold in make_folds(cases, 5, seed=1):
        assert [sum(int(c[1:-2]) < 20 for c in fold), len(fold)] == [4, 5]
    assert [len(fold) for fold in make_folds(cases[:5], 6, seed=0)] == [1] * 5  # no more folds than patients
    assert make_folds(cases[:1], 5, seed=0) == ()


def test_fingerprint_sees_canonical_axes_and_foreground(tmp_path: Path) -> None:
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:4] = 5
    image = np.where(labels == 5, 70, -1000).astype(np.int16)
    for name, array in (("i", image), ("l", labels)):  # file axes: z up to 8 of 3 mm, y, x
        affine = np.array([[0, 0, 1.0, 0], [0, 2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
        write_nifti(tmp_path / f"{name}.nii", array, affine)
    case = LabelledCase(case=Case(id="a", files={"ct": tmp_path / "i.nii"}, group="g"), label=tmp_path / "l.nii")
    found = fingerprint([case])
    (facts,) = found.cases
    assert (facts.shape, facts.spacing_mm) == ((8, 9, 10), (3.0, 2.0, 1.0))
    assert facts.voxels == {0: 540, 5: 180}
    role = found.roles["ct"]
    assert (role.mean, role.std, role.low, role.high) == (70.0, 0.0, (-1000.0, -1000.0), (70.0, 70.0))
    json.dumps(found.to_json())


def test_a_data_set_keeps_its_folds_names_and_ignored_value(tmp_path: Path) -> None:
    place = tmp_path / "Dataset003_Boxes"
    source = write_cohort(tmp_path / "plain", cases=4, size=16).parent
    for i in range(4):
        for folder, name in (("imagesTr", f"c{i}_0000.nii.gz"), ("labelsTr", f"c{i}.nii.gz")):
            (place / folder).mkdir(parents=True, exist_ok=True)
            kind = "t1" if folder == "imagesTr" else "dseg"
            shutil.copyfile(source / f"c{i}_{kind}.nii.gz", place / folder / name)
    labels = {"background": 0, "bright": 3, "ignore": 7}
    values = {"channel_names": {"0": "T1"}, "labels": labels, "file_ending": ".nii.gz"}
    (place / "dataset.json").write_text(json.dumps(values))
    folds = [{"train": ["c1", "c2", "c3"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1", "c2", "c3"]}]
    (place / "splits_final.json").write_text(json.dumps(folds))
    plan = plan_cohort(place, tmp_path / "plan", memory=GIB, folds=2)
    run = TrainRun.load(tmp_path / "plan" / "run.toml")
    assert (dict(run.labels), run.ignore_label) == ({3: "bright"}, 7)
    assert plan.folds == (("c0",), ("c1", "c2", "c3"))
    assert [c.role for c in run.preprocessing.channels] == ["T1"]
    regions = {"labels": {"background": 0, "both": [3, 7], "bright": 3}, "regions_class_order": [7, 3]}
    (place / "dataset.json").write_text(json.dumps({**values, **regions}))
    plan_cohort(place, tmp_path / "regions", memory=GIB, folds=2)
    run = TrainRun.load(tmp_path / "regions" / "run.toml")
    assert dict(run.regions) == {"both": (3, 7), "bright": (3,)}
    assert run.regions_class_order == (7, 3)


def test_the_run_file_is_one_that_train_takes(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "data", cases=8, size=16)
    plan = plan_cohort(manifest, tmp_path / "plan", memory=GIB, folds=4, fold=1)
    run = TrainRun.load(tmp_path / "plan" / "run.toml")
    assert run.preprocessing.window == plan.patch == (16, 16, 16)
    assert run.preprocessing.spacing_mm == (1.5, 1.5, 1.5)
    assert dict(run.labels) == {3: "label 3", 7: "label 7"}
    cases = cohort.read(run.manifest, ["t1"], labels=tuple(run.labels))
    parts = cohort.split(cases, validation_share=0.2, seed=0)
    assert {c.case.id for c in parts.validation} == set(plan.folds[1])
    assert {c.case.group for c in parts.train}.isdisjoint({c.case.group for c in parts.validation})
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["patch"] == [16, 16, 16]
