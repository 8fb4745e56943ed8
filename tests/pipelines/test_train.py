"""Training: learns, resumes exactly, ends with a bundle that production runs; faults are one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError
from medmamba.formats.nifti import read_labels
from medmamba.source import read_all
from pipelines.cases import cohort
from pipelines.config import AugmentSection, TrainRun
from pipelines.learning import sampling
from pipelines.learning.sampling import Sampler, prepare
from pipelines.learning.train import learning_rate, train
from pipelines.scoring.evaluate import evaluate_bundle
from pipelines.serving.predict import Predictor, predict
from tests.pipelines.cohort_maker import LABELS, run_values, write_cohort, write_nifti


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


def history(output: Path) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads((output / "checkpoint/checkpoint.json").read_text())["history"]
    return values


def test_sixty_steps_learn_boxes_and_the_bundle_runs_in_production(manifest: Path, tmp_path: Path) -> None:
    settings = {"epochs": 3, "steps_per_epoch": 20, "validate_every": 3, "lr": 1e-2, "cleaning": "none"}
    run = TrainRun.check(run_values(manifest, tmp_path, **settings))
    seen: list[tuple[int, int]] = []
    logged: dict[int, dict[str, float]] = {}
    bundle = train(run, log=lambda f, s: logged.update({s: f}), progress=lambda d, a: seen.append((d, a)))
    losses = [x for h in history(tmp_path) for x in h["losses"]]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert seen == [(i + 1, 60) for i in range(60)]
    assert list(logged) == [20, 40, 60]
    assert logged[60]["validation_dice"] > 0.8  # boxes differ from noise by 6 and 12 standard deviations
    assert bundle == Bundle.load(tmp_path / "bundle")
    cases = cohort.read(manifest, ["t1"])
    held = cohort.split(cases, validation_share=run.validation_share, seed=run.seed).validation
    again = evaluate_bundle(bundle, held, device="cpu")
    assert again.mean() == logged[60]["validation_dice"]  # validation is production's prediction
    assert json.loads((tmp_path / "validation/evaluation.json").read_text())["mean"]["dice"] == again.mean()
    report = predict(Predictor.load(bundle, device="cpu"), held[0].case, tmp_path / "products")
    written, _ = read_labels(next((tmp_path / "products").rglob("*_dseg.nii.gz")))
    assert set(np.unique(written)) <= {0, *LABELS}  # the user's own integers
    assert report.numbers["labels"]["3"]["name"] == "bright"
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin", ".part")]


def test_resume_follows_the_unbroken_run_bit_by_bit(manifest: Path, tmp_path: Path) -> None:
    whole = train(TrainRun.check(run_values(manifest, tmp_path / "whole", epochs=3, augment={"affine": 1.0})))
    run = TrainRun.check(run_values(manifest, tmp_path / "cut", epochs=3, augment={"affine": 1.0}))

    def stop(figures: dict[str, float], step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, log=stop)
    assert len(history(tmp_path / "cut")) == 2
    torch.manual_seed(99)  # whatever the process did in between
    resumed = train(run, resume=True)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert resumed.id == whole.id
    assert len(list((tmp_path / "cut/checkpoint").glob("state_*"))) == 1
    assert train(run, resume=True).id == whole.id  # nothing left to do: the same bundle


def test_a_begun_training_is_neither_overwritten_nor_resumed_with_other_settings(
    manifest: Path, tmp_path: Path
) -> None:
    values = run_values(manifest, tmp_path, epochs=1, steps_per_epoch=1, validation_share=0.0)
    train(TrainRun.check(values))
    with pytest.raises(ConfigError, match="--resume"):
        train(TrainRun.check(values))
    with pytest.raises(ConfigError, match=r"other settings of \['epochs', 'lr'\]"):
        train(TrainRun.check({**values, "epochs": 2, "lr": 1e-4}), resume=True)
    state = next((tmp_path / "checkpoint").glob("state_*"))
    state.write_bytes(state.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ConfigError, match="is not what was saved"):
        train(TrainRun.check(values), resume=True)


def test_loss_that_is_not_finite_stops_with_step_and_cases(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler.draw

    def poisoned(self: Sampler, step: int) -> sampling.Batch:
        batch = draw(self, step)
        if step == 4:
            batch.image[0, 0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(Sampler, "draw", poisoned)
    with pytest.raises(ConfigError, match=r"^step 4, cases c\d.*: loss nan") as told:
        train(TrainRun.check(run_values(manifest, tmp_path)))
    assert "\n" not in str(told.value)
    assert len(history(tmp_path)) == 1  # the first epoch is kept
    with pytest.raises(ConfigError, match=r"^step 4, cases c\d.*: layer '.+': .* of its input"):
        train(TrainRun.check(run_values(manifest, tmp_path, debug=True)), resume=True)


def test_label_values_that_are_not_listed_are_refused_or_background(manifest: Path, tmp_path: Path) -> None:
    values = run_values(manifest, tmp_path, labels={"3": "bright"}, epochs=1, steps_per_epoch=1)
    with pytest.raises(ConfigError, match=r"label values \[7\]"):
        train(TrainRun.check(values))
    assert train(TrainRun.check({**values, "other_labels": "background"})).task["values"] == {"1": 3}


def test_unknown_architecture_and_setting_are_told(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'x' unknown; known: .*mamba_unet.*segresnet"):
        train(TrainRun.check(run_values(manifest, tmp_path, architecture="x")))
    with pytest.raises(ConfigError, match=r"no settings \['width'\]; known: .*widths"):
        train(TrainRun.check(run_values(manifest, tmp_path, network={"width": 3})))


def test_prepared_cases_are_what_the_contract_gives(manifest: Path, tmp_path: Path) -> None:
    contract = TrainRun.check(run_values(manifest, tmp_path)).preprocessing.contract()
    case = cohort.read(manifest, ["t1"])[1]  # stored turned
    prepared = prepare(case, contract, (3, 7))
    sources = {"t1": sampling.open_source(case.case.files["t1"])}
    assert np.array_equal(prepared.image, read_all(contract.forward(sources)).array)
    means = [prepared.image[0][prepared.labels == k].mean() for k in (0, 1, 2)]
    assert means[1] > means[2] + 0.5 > means[0] + 1  # labels turned with their image: bright, dim, background
    assert {k: v.size for k, v in prepared.places.items()} == {k: int((prepared.labels == k).sum()) for k in (1, 2)}


def test_cells_of_the_ignore_label_teach_nothing(manifest: Path, tmp_path: Path) -> None:
    values = run_values(manifest, tmp_path, labels={"3": "bright"}, ignore_label=7, epochs=1, steps_per_epoch=1)
    run = TrainRun.check(values)
    case = cohort.read(manifest, ["t1"])[0]
    prepared = prepare(case, run.preprocessing.contract(), (3,), 7)
    assert set(np.unique(prepared.labels)) == {-1, 0, 1}
    assert set(prepared.places) == {1}
    train(run)
    with pytest.raises(ConfigError, match="give its own value"):
        TrainRun.check({**values, "ignore_label": 3})


def test_small_images_are_padded_to_a_window(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "data", cases=3, size=8)
    run = TrainRun.check(run_values(manifest, tmp_path, epochs=1, steps_per_epoch=1, validation_share=0.5))
    prepared = prepare(cohort.read(manifest, ["t1"])[0], run.preprocessing.contract(), (3, 7))
    assert prepared.labels.shape == (12, 12, 12)
    train(run)


def sampler(manifest: Path, tmp_path: Path, *, share: float, **augment: float) -> Sampler:
    contract = TrainRun.check(run_values(manifest, tmp_path)).preprocessing.contract()
    cases = [prepare(c, contract, (3, 7)) for c in cohort.read(manifest, ["t1"])]
    off = {"flip": 0.0, "affine": 0.0, "gamma": 0.0, "scale": 0.0, "noise": 0.0}
    settings = AugmentSection(**{**off, **augment})
    return Sampler(cases, (4, 4, 4), batch=2, foreground_share=share, augment=settings, seed=5)


def test_draws_depend_on_the_step_alone(manifest: Path, tmp_path: Path) -> None:
    one = sampler(manifest, tmp_path, share=0.5, flip=0.5, affine=0.5, gamma=0.5, scale=0.5, noise=0.5)
    first = [one.draw(step) for step in range(6)]
    for step in (4, 0, 3):
        again = one.draw(step)
        assert again.cases == first[step].cases
        assert torch.equal(again.image, first[step].image)
        assert torch.equal(again.labels, first[step].labels)
    assert not torch.equal(first[0].image, first[1].image)


def test_foreground_share_is_kept(manifest: Path, tmp_path: Path) -> None:
    always = sampler(manifest, tmp_path, share=1.0)
    assert all(bool((b.labels > 0).flatten(1).any(1).all()) for b in map(always.draw, range(40)))
    never = sampler(manifest, tmp_path, share=0.0)
    empty = sum(int((~(never.draw(s).labels > 0).flatten(1).any(1)).sum()) for s in range(40))
    assert empty > 5  # of 80 uniform patches of 4^3 in 16^3 with two boxes of 7^3


def test_geometry_moves_labels_with_the_image(manifest: Path, tmp_path: Path) -> None:
    moved = sampler(manifest, tmp_path, share=1.0, flip=0.5, affine=1.0)
    bright, rest = [], []
    for step in range(30):
        batch = moved.draw(step)
        bright.append(batch.image[batch.labels == 1])
        rest.append(batch.image[batch.labels == 0])
    assert torch.cat(bright).mean() > torch.cat(rest).mean() + 1.0  # in standard deviations of the image


def test_learning_rate_rises_then_falls_to_nothing(manifest: Path, tmp_path: Path) -> None:
    run = TrainRun.check(run_values(manifest, tmp_path, warmup_steps=2, epochs=4, steps_per_epoch=5, lr=1.0))
    rates = [learning_rate(run, s) for s in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a >= b for a, b in pairwise(rates[2:]))
    assert rates[-1] < 0.01


def test_two_channels_by_role(tmp_path: Path) -> None:
    rows = ["case,a,b,label"]
    for n in range(2):
        array = np.random.default_rng(n).normal(size=(12, 12, 12)).astype(np.float32)
        for role in "ab":
            write_nifti(tmp_path / f"{n}{role}.nii.gz", array, np.eye(4))
        write_nifti(tmp_path / f"{n}.nii.gz", (array > 1).astype(np.uint8), np.eye(4))
        rows.append(f"{n},{n}a.nii.gz,{n}b.nii.gz,{n}.nii.gz")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    values = run_values(tmp_path / "m.csv", tmp_path, labels={"1": "high"}, epochs=1, steps_per_epoch=1)
    values["preprocessing"] = {"channels": [{"role": "a"}, {"role": "b"}], "window": [12, 12, 12]}
    assert train(TrainRun.check(values)).config["in_channels"] == 2
