"""Folds: every case held out once and never with its group, resumable, one bundle; cleaning chosen on what was held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import ConfigError
from medmamba.formats.nifti import read_labels
from pipelines.cases import cohort
from pipelines.cases.case import Case
from pipelines.cases.cohort import LabelledCase
from pipelines.config import TrainRun
from pipelines.layouts import nnunet
from pipelines.learning.folds import fold_parts
from pipelines.learning.learned import Held, conclude
from pipelines.learning.train import train
from pipelines.networks import NETWORKS
from pipelines.scoring.evaluate import kept_path
from pipelines.serving.predict import Predictor, predict
from pipelines.tasks import build_task
from tests.pipelines.cohort_maker import run_values, write_cohort, write_nifti

SMALL = {"widths": [2, 4], "depths": [1, 1], "state": 1, "mixer": "none"}


def known(name: str, group: str, **told: str) -> LabelledCase:
    return LabelledCase(case=Case(id=name, files={"t1": Path(name)}, group=group), label=Path(name), **told)


def small_run(manifest: Path, output: Path, **changes: Any) -> TrainRun:
    return TrainRun.check(
        run_values(manifest, output, network=SMALL, epochs=1, steps_per_epoch=1, batch=1, augment={"affine": 0})
        | changes
    )


@given(st.lists(st.integers(0, 7), min_size=3, max_size=20).filter(lambda g: len(set(g)) >= 3), st.integers(0, 3))
def test_each_case_is_held_out_once_and_apart_from_its_group(groups: list[int], seed: int) -> None:
    cases = [known(f"c{i}", f"p{g}") for i, g in enumerate(groups)]
    parts = fold_parts([*cases, known("t", "t", split="test")], 3, seed=seed)
    assert sorted(c.case.id for part in parts for c in part.validation) == sorted(c.case.id for c in cases)
    for part in parts:
        assert not {c.case.group for c in part.train} & {c.case.group for c in part.validation}
        assert len(part.train) + len(part.validation) == len(cases)


def test_the_folds_of_the_cohort_are_kept() -> None:
    cases = [known(f"c{i}", f"p{i // 2}", fold=str(i // 2)) for i in range(6)]
    parts = fold_parts(cases, 3, seed=0)
    assert [[c.case.id for c in part.validation] for part in parts] == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]
    with pytest.raises(ConfigError, match=r"folds = 2: the column fold holds \['0', '1', '2'\]"):
        fold_parts(cases, 2, seed=0)
    with pytest.raises(ConfigError, match="the column fold holds"):
        fold_parts([*cases, known("c6", "p6")], 3, seed=0)
    with pytest.raises(ConfigError, match=r"groups \['p0'\] stand in several folds"):
        fold_parts([*cases, known("c6", "p0", fold="2")], 3, seed=0)


def test_more_folds_than_patients_are_refused() -> None:
    with pytest.raises(ConfigError, match="folds = 3: 2 groups"):
        fold_parts([known(f"c{i}", f"p{i % 2}") for i in range(6)], 3, seed=0)


def test_the_saved_splits_of_nnunet_are_folds(tmp_path: Path) -> None:
    for number in range(4):
        write_nifti(tmp_path / f"imagesTr/c{number}_0000.nii.gz", np.ones((3, 3, 3), np.int16), np.eye(4))
        write_nifti(tmp_path / f"labelsTr/c{number}.nii.gz", np.ones((3, 3, 3), np.uint8), np.eye(4))
    told = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(told))
    splits = [{"train": ["c0", "c1"], "val": ["c2", "c3"]}, {"train": ["c2", "c3"], "val": ["c0", "c1"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    cases = cohort.read(tmp_path, ["ct"])
    assert [sorted(c.case.id for c in p.validation) for p in fold_parts(cases, 2, seed=0)] == [
        ["c2", "c3"],
        ["c0", "c1"],
    ]
    assert {c.case.id: c.split for c in cases} == dict.fromkeys(("c0", "c1"), "train") | dict.fromkeys(
        ("c2", "c3"), "validation"
    )
    assert nnunet.saved_folds(tmp_path) == (("c2", "c3"), ("c0", "c1"))


def test_folds_make_one_bundle_told_by_every_case_and_resume(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "data", cases=4, size=12)
    logged: list[str] = []
    seen: list[tuple[int, int]] = []
    whole = train(
        small_run(manifest, tmp_path / "whole", folds=2),
        log=lambda f, _: logged.extend(f),
        progress=lambda d, a: seen.append((d, a)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert {"fold_0/loss", "fold_1/loss"} <= set(logged)
    assert len(whole.weights) == len(set(whole.weight_hashes)) == whole.card["folds"] == 2
    rows = json.loads((tmp_path / "whole/validation/evaluation.json").read_text())["rows"]
    assert sorted({row["case"] for row in rows}) == ["c0", "c1", "c2", "c3"]
    assert len(rows) == 4 * 2
    run = small_run(manifest, tmp_path / "cut", folds=2)

    def stop(figures: dict[str, float], step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, log=stop)
    assert not (run.output / "bundle").exists()
    with pytest.raises(ConfigError, match="--resume"):
        train(run)
    assert train(run, resume=True).id == whole.id
    case = cohort.read(manifest, ["t1"])[0].case
    report = predict(Predictor.load(whole, device="cpu"), case, tmp_path / "products")
    assert report.status == "done"


def test_cleaning_that_helps_held_out_cases_is_part_of_the_bundle(tmp_path: Path) -> None:
    """Predictions with an island on label 3 and a wrong hole-like label 7 that no step improves."""
    manifest = write_cohort(tmp_path / "data", cases=3, size=12)
    run = small_run(manifest, tmp_path / "run")
    cases = cohort.read(manifest, ["t1"])
    held = Held(cases=cases, folder=tmp_path / "held")
    for case in cases:
        labels, grid = read_labels(case.label)
        labels = labels.astype(np.uint8)
        corner = np.argwhere(labels == 0)
        labels[tuple(corner[0] if labels[tuple(corner[-1])] else corner[-1])] = 3
        write_nifti(kept_path(held.folder, case), labels.T, grid.affine[:, [2, 1, 0, 3]])
    states = [NETWORKS[run.architecture](run.network_config).state_dict()]
    bundle = conclude(run, states, cases, [held])
    assert bundle.task["cleaning"] == {"1": ["largest_component"]}
    told = bundle.card["cleaning"][0]
    assert told["name"] == "bright"
    assert told["dice_before"] < told["dice"] == 1.0
    rows = json.loads((run.output / "validation/evaluation.json").read_text())["rows"]
    assert {row["dice"] for row in rows if row["label"] == 3} == {1.0}  # scored as production writes
    plain = conclude(run.model_copy(update={"cleaning": "none"}), states, cases, [held])
    assert "cleaning" not in plain.task
    assert plain.id != bundle.id
    noise = np.random.default_rng(0).integers(0, 3, (6, 6, 6))
    torn = np.array([0, 3, 7], np.uint8)[noise]
    torn[0], torn[1] = 0, 0
    torn[0, 0, 0] = 3
    task = build_task(bundle.task)
    assert task.finish(torn.copy())[0, 0, 0] == 0
    assert np.array_equal(task.finish(torn.copy()) == 7, torn == 7)
    assert build_task(plain.task).finish(torn) is torn
    with pytest.raises(ConfigError, match=r"cleaning \['polish'\] unknown; known: largest_component"):
        build_task({**plain.task, "cleaning": {"1": ["polish"]}})
