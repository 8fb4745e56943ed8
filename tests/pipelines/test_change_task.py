"""Change as a task: scores to maps, run files, training from the field's layouts, threshold, calibration, checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError
from pipelines.cases.case import Case
from pipelines.layouts.change_labels import ORDERS
from pipelines.learning.change_lesson import ChangeLesson, example, split
from pipelines.learning.change_run import ChangeRun, load_run
from pipelines.learning.losses import IGNORED
from pipelines.learning.train import train
from pipelines.networks import NETWORKS
from pipelines.scoring.change_evaluate import check_model, evaluate_pairs
from pipelines.serving.predict import Predictor
from pipelines.serving.predict_pair import predict_pair
from pipelines.tasks import TASKS, build_task
from pipelines.tasks.change import BinaryChange, Comparison, SemanticChange, probability
from pipelines.tracking import checks_of, reliability_of
from tests.ways.tiny_pair import DIFFERENCE, Difference, changed, ground, make_bundle, truth

NETWORK = {"widths": [8], "depths": [1], "mixer": "none"}


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(pixels).save(path)


def write_levir(root: Path) -> Path:
    """LEVIR-CD's folders with seven pairs: five to learn from, two to validate on."""
    for number in range(7):
        name = f"{'train' if number < 5 else 'val'}_{number}.png"
        scene = ground(number)
        write_picture(root / "A" / name, np.moveaxis(scene, 0, -1))
        write_picture(root / "B" / name, np.moveaxis(changed(scene), 0, -1))
        write_picture(root / "label" / name, np.where(truth(), 255, 0).astype(np.uint8))
    return root


def write_second(root: Path) -> Path:
    """SECOND's folders with four pairs of class ids: blocks become class 5, from class 1; a few pixels unlabelled."""
    for number in range(4):
        name, scene = f"{number}.png", ground(number)
        write_picture(root / "im1" / name, np.moveaxis(scene, 0, -1))
        write_picture(root / "im2" / name, np.moveaxis(changed(scene), 0, -1))
        before, after = np.where(truth(), 1, 0).astype(np.uint8), np.where(truth(), 5, 0).astype(np.uint8)
        before[0, :3] = after[0, :3] = 255
        write_picture(root / "label1" / name, before)
        write_picture(root / "label2" / name, after)
    return root


def values(dataset: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of a minute's thousandth."""
    run = {
        **{"name": "pairs", "dataset": str(dataset), "output": str(output), "network": NETWORK, "seed": 1},
        **{
            "epochs": 1,
            "steps_per_epoch": 2,
            "batch": 2,
            "lr": 2e-2,
            "device": "cpu",
            "validate_every": 9,
            "memory": "stored",
        },
        "preprocessing": {"window": [32, 32]},
        "augment": {"affine": 0.0, "gamma": 0.0},
        "comparison": {"normalise": "none"},  # to be quick; the run file below leaves it on
    }
    return run | changes


@pytest.fixture(scope="module")
def levir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_levir(tmp_path_factory.mktemp("levir"))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_second(tmp_path_factory.mktemp("second"))


scores = st.integers(3, 5).flatmap(
    lambda k: st.lists(st.floats(-90, 90, width=32), min_size=(2 + 2 * k) * 6, max_size=(2 + 2 * k) * 6)
)


@settings(max_examples=60, deadline=None)
@given(scores, st.floats(0, 1))
def test_semantic_maps_are_zero_exactly_where_nothing_changed(flat: list[float], threshold: float) -> None:
    array = np.array(flat, dtype=np.float32).reshape(-1, 2, 3)
    count = (len(array) - 2) // 2
    task = SemanticChange(classes=tuple(f"class {k}" for k in range(count)), threshold=threshold)
    maps = task.decode(array)
    assert set(maps) == {*task.layers, "confidence"}
    changed_cells = probability(array) >= threshold
    for name, first in (("from", 2), ("to", 2 + count)):
        assert np.array_equal(maps[name][0] > 0, changed_cells)
        best = array[first + 1 : first + count].max(0)
        written = np.take_along_axis(array[first : first + count], maps[name].astype(np.int64), 0)[0]
        assert np.array_equal(written[changed_cells], best[changed_cells])
    assert maps["confidence"].max() <= 100
    binary = BinaryChange(threshold=threshold).decode(array[:2])
    assert np.array_equal(binary["change"], maps["change"])
    assert np.array_equal(binary["confidence"], maps["confidence"])


def test_confidence_is_of_what_is_written_and_follows_the_curve() -> None:
    array = np.array([[[0.0, 0.0]], [[4.0, -4.0]]], dtype=np.float32)
    plain = BinaryChange().decode(array)
    assert plain["change"].tolist() == [[[1, 0]]]
    assert plain["confidence"].tolist() == [[[98, 98]]]  # the sigmoid of 4
    curve = (0.1,) * 128 + (0.6,) * 128
    assert BinaryChange(curve=curve).decode(array)["confidence"].tolist() == [[[60, 90]]]


def test_settings_are_checked() -> None:
    assert {"segmentation", "binary_change", "semantic_change"} <= set(TASKS)
    entry = {"name": "semantic_change", "classes": ["unchanged", "a", "b"], "comparison": {"least_area": 9.0}}
    task = build_task(entry)
    assert isinstance(task, SemanticChange)
    assert task.comparison == Comparison(least_area=9.0)
    for wrong in (
        {"classes": ["unchanged", "a"]},
        {"threshold": 1.5},
        {"comparison": {"register": "maybe"}},
        {"comparison": {"shape": 1}},
    ):
        with pytest.raises(ConfigError):
            build_task(entry | wrong)


def test_both_dates_are_scaled_alike(levir: Path, tmp_path: Path) -> None:
    run = ChangeRun.check(values(levir, tmp_path))
    contract = run.preprocessing.contract()
    assert contract.roles == ("before", "after")
    earlier, later = contract.channels[:3], contract.channels[3:]
    for one, other in zip(earlier, later, strict=True):
        assert (one.volume, one.shift, one.scale, one.scaling) == (other.volume, other.shift, other.scale, "fixed")
    with pytest.raises(ConfigError, match="zscore"):
        ChangeRun.check(values(levir, tmp_path, preprocessing={"bands": [{"name": "red", "scaling": "zscore"}]}))
    with pytest.raises(ConfigError, match="classes at both dates"):
        _ = ChangeRun.check(values(levir, tmp_path, change="semantic")).task


def test_binary_training_ends_with_a_bundle_that_production_runs(levir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'name = "pairs"\ndataset = "{levir}"\noutput = "out"\nepochs = 2\nsteps_per_epoch = 30\nbatch = 2\nlr = 2e-2\n'
        'device = "cpu"\nvalidate_every = 2\nmemory = "stored"\n[network]\nwidths = [8]\ndepths = [1]\nmixer = "none"\n'
        "[preprocessing]\nwindow = [32, 32]\n[augment]\naffine = 0.0\ngamma = 0.0\n"
    )
    run = load_run(tmp_path / "run.toml")
    assert isinstance(run, ChangeRun)
    logged: list[dict[str, float]] = []
    bundle = train(run, log=lambda figures, step: logged.append(figures))
    assert bundle == Bundle.load(tmp_path / "out/bundle")
    assert bundle.config["in_channels"] == 6
    figures = logged[1]
    assert figures["validation_f1_at_threshold"] >= figures["validation_f1"] - 1e-9
    assert figures["validation_f1_at_threshold"] > 0.8  # blocks are brighter by half of the contrast of the ground
    assert bundle.task["threshold"] == figures["validation_threshold"]
    assert len(bundle.task["curve"]) == 256
    assert logged[2] == {f"check_{name}": value for name, value in bundle.card["checks"].items()}
    saved = json.loads((tmp_path / "out/validation/change_evaluation.json").read_text())
    assert saved["at_threshold"]["binary"]["figures"]["f1"] == figures["validation_f1_at_threshold"]
    assert sum(row["pixels"] for row in saved["reliability"]) == 2 * truth().size
    predictor = Predictor.load(bundle, device="cpu")
    rows = [r for r in run.found.rows if r.split == "validation"]
    again = evaluate_pairs(predictor, run.found, rows, threshold=bundle.task["threshold"])
    assert again.at_threshold["binary"].figures()["f1"] == figures["validation_f1_at_threshold"]
    shown = Predictor.load(bundle, device="cpu", mode="stream")  # the whole pair in one piece
    files = {"before": rows[0].files["before"], "after": rows[0].files["after"]}
    report = predict_pair(shown, Case(id="one", files=files), tmp_path / "products")
    assert report.numbers["areas"]["changed"] == pytest.approx(truth().sum(), rel=0.3)
    page = (tmp_path / "products" / bundle.title / "one_page.html").read_text()
    assert "Reliability on held-out pairs" in page
    assert checks_of(bundle) == logged[2] | {"threshold": bundle.task["threshold"]}  # what MLflow shows of this model
    diagram = reliability_of(bundle)
    assert diagram == sorted(diagram)
    assert diagram[0][1] < 0.1 < 0.7 < diagram[-1][1]  # what is said to be unchanged is, what is said to change does


def test_semantic_training_from_second_as_downloaded(second: Path, tmp_path: Path) -> None:
    run = ChangeRun.check(values(second, tmp_path, change="semantic", validation_share=0.25))
    lesson = ChangeLesson.of(run)
    assert (len(lesson.learned), len(lesson.held)) == (3, 1)
    drawn = example(run, lesson.train[0])
    assert drawn.labels.shape[0] == 3
    assert (drawn.labels[:, 0, :3] == IGNORED).all()  # 255 of the label pictures
    assert set(np.unique(drawn.labels[2])) == {IGNORED, 0, 5}
    image, labels = drawn.patch((slice(16, 48), slice(20, 52)))
    assert (image.shape, labels.shape) == ((6, 32, 32), (3, 32, 32))
    assert (np.abs(image[3:] - image[:3]).mean(0)[labels[0] == 1] > 0.3).all()
    bundle = train(run)
    assert tuple(bundle.task["classes"]) == ORDERS["open_cd"]
    assert bundle.config["out_channels"] == 2 + 2 * 7
    assert {"same_scene_changed", "swap_iou", "swap_matrix_mismatch"} == set(bundle.card["checks"])
    told = bundle.card["validation"]["at_threshold"]
    assert {p: told[p]["figures"]["protocol"] for p in told} == {p: p for p in ("binary", "per_date", "from_to")}


def test_resume_follows_the_unbroken_run(levir: Path, tmp_path: Path) -> None:
    whole = train(ChangeRun.check(values(levir, tmp_path / "whole", epochs=2)))
    run = ChangeRun.check(values(levir, tmp_path / "cut", epochs=2))

    def stop(figures: dict[str, float], step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, log=stop)
    assert train(run, resume=True).id == whole.id


def test_published_networks_learn_pairs_by_name(second: Path, tmp_path: Path) -> None:
    small = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "width": 8, "drop_path": 0.0}
    run = values(
        second, tmp_path, change="semantic", architecture="mambascd", memory="auto", network=small, steps_per_epoch=1
    )
    bundle = train(ChangeRun.check(run | {"validation_share": 0.0}))
    assert (bundle.network, bundle.classes) == ("mambascd", 16)
    assert "threshold" not in bundle.task  # nobody to choose it on


def test_checks_find_a_model_that_sees_change_where_none_is(
    levir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Biased(Difference):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.tensor([-1.0, -1.0])[None, :, None, None]

    files = {"before": levir / "A/val_5.png", "after": levir / "B/val_5.png"}
    told = {}
    for name, network in (("fair", Difference), ("biased", Biased)):
        monkeypatch.setitem(NETWORKS, DIFFERENCE, network)
        bundle = make_bundle(tmp_path / name, comparison={"normalise": "none"})
        told[name] = check_model(Predictor.load(bundle, device="cpu"), [files], 0.5)
    assert told["fair"] == {"same_scene_changed": 0.0, "swap_iou": 1.0}
    assert told["biased"]["same_scene_changed"] == 1.0
    semantic = make_bundle(tmp_path / "semantic", task="semantic_change", comparison={"normalise": "none"})
    monkeypatch.setitem(NETWORKS, DIFFERENCE, Difference)
    assert check_model(Predictor.load(semantic, device="cpu"), [files], 0.5)["swap_matrix_mismatch"] == 0.0


def test_the_split_of_the_data_set_rules_and_a_missing_file_is_told(tmp_path: Path) -> None:
    place = write_levir(tmp_path / "levir")
    run = ChangeRun.check(values(place, tmp_path))
    learned, held = split(run.found, share=0.5, seed=0)
    assert (len(learned), [row.split for row in held]) == (5, ["validation"] * 2)
    (place / "label/train_2.png").unlink()
    with pytest.raises(ConfigError, match=r"train_2\.png is not there; `medmamba check"):
        train(ChangeRun.check(values(place, tmp_path)))


def test_whole_scenes_are_held_out_where_the_data_set_names_none(second: Path, tmp_path: Path) -> None:
    found = ChangeRun.check(values(second, tmp_path)).found
    learned, held = split(found, share=0.5, seed=3)
    assert (len(learned), len(held)) == (2, 2)
    assert not {row.group for row in learned} & {row.group for row in held}
