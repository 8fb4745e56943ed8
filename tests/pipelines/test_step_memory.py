"""The memory mode of a training: chosen from the budget, refused when there is none, and without effect on weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medmamba.errors import ConfigError
from medmamba.memory import measure
from pipelines.config import TrainRun
from pipelines.learning.step_memory import largest_window, patch_shape, settle_memory, step_cost, training_loss
from pipelines.learning.train import build, train
from tests.pipelines.cohort_maker import run_values, write_cohort

CPU = torch.device("cpu")


def run(**changes: Any) -> TrainRun:
    network = {"widths": [4, 8], "depths": [1, 1], "mixer": "none"}
    return TrainRun.check(run_values(Path("m.csv"), Path("out"), **{"network": network, **changes}))


def test_auto_takes_the_fastest_mode_that_fits() -> None:
    costs = {mode: step_cost(run(), mode) for mode in ("stages", "full")}
    assert costs["stages"].total > costs["full"].total
    settings = run(ram=f"{costs['stages'].total / 1024 + 0.1:.1f}K")
    network = build(settings)
    settle_memory(network, settings, CPU)
    assert network.memory == "stages"
    with pytest.raises(ConfigError, match=r"\(2, 1, 12, 12, 12\).*full.*ram"):
        settle_memory(build(run()), run(ram=f"{costs['full'].total // 1024 - 1}K"), CPU)


def test_a_named_mode_is_taken_and_must_exist() -> None:
    network = build(run(memory="stages"))
    settle_memory(network, run(memory="stages"), CPU)
    assert network.memory == "stages"
    twin = {"widths": [4, 8], "depths": [1, 1], "down": "strided"}
    with pytest.raises(ConfigError, match="has stored, stages"):
        settle_memory(build(run(network=twin)), run(network=twin, memory="full"), CPU)
    with pytest.raises(ConfigError, match="no memory modes"):
        settle_memory(torch.nn.Identity(), run(memory="full"), CPU)


def test_the_prediction_is_that_of_the_real_step_with_the_real_loss() -> None:
    settings = run()
    shape = patch_shape(settings)
    labels = torch.randint(0, 3, (shape[0], *shape[2:]))
    found = measure(build(settings), torch.randn(shape), labels, training_loss)
    assert step_cost(settings, "full").peak == pytest.approx(found.peak, rel=0.15)


def test_the_largest_window_fits_and_the_next_one_does_not() -> None:
    preprocessing = run().preprocessing
    small = run(network={"widths": [4], "depths": [1], "mixer": "none"})
    sized = [
        small.model_copy(update={"preprocessing": preprocessing.model_copy(update={"window": (n,) * 3})})
        for n in (5, 6)
    ]
    window, cost = largest_window(small, step_cost(sized[0]).total)
    assert window == (5, 5, 5)
    assert cost == step_cost(sized[0])
    assert step_cost(sized[1]).total > cost.total


def test_the_mode_changes_no_weight_and_may_change_on_resume(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", cases=2)
    short, ids = {"epochs": 1, "steps_per_epoch": 2, "validation_share": 0.0}, []
    for memory in ("stored", "full"):
        values = run_values(manifest, tmp_path / memory, memory=memory, **short)
        ids.append(train(TrainRun.check(values)).id)
    assert ids[0] == ids[1]
    values = run_values(manifest, tmp_path / "full", memory="auto", ram="1G", **short)
    assert train(TrainRun.check(values), resume=True).id == ids[0]
