"""Ensembles streamed: folds in turn, mirrored images with their scores turned back, disagreement, planes."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmamba import scratch
from medmamba.ensemble import OUTPUTS, Disagreement, MeanOfFolds, Mirrored, Moments
from medmamba.layers.planes import OnPlanes
from medmamba.stream_plan import plan, scratch_numbers
from tests.medmamba.test_stream import SHAPE, Killed, make, noise, streamed, whole


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


def folds(count: int = 2, mixer: str = "none") -> list[nn.Module]:
    found = [make(mixer=mixer) for _ in range(count)]
    for number, fold in enumerate(found):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in fold.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return list(found)


ENSEMBLES: dict[str, Callable[[], nn.Module]] = {
    "folds": lambda: MeanOfFolds(folds(3, "s6")),
    "folds of regions": lambda: MeanOfFolds(folds(), OUTPUTS["sigmoid"]),
    "mirrored along the rows": lambda: Mirrored(make(mixer="s6"), (0,)),
    "mirrored every way": lambda: Mirrored(make(mixer="none", widths=(8,), depths=(1,)), (0, 1, 2)),
    "mirrored folds": lambda: Mirrored(MeanOfFolds(folds()), (0, 2)),
    "disagreement": lambda: Disagreement(Mirrored(Moments(folds()), (0,)), OUTPUTS["softmax"]),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_streams_as_its_members_do(name: str, tmp_path: Path) -> None:
    """No side is a multiple of the strides: the padding lies at the far ends of each mirrored image."""
    network, array = ENSEMBLES[name]().eval(), noise(SHAPE)
    found, _ = streamed(network, array, tmp_path, 7, classes=4 if name == "disagreement" else 3)
    full = whole(network, array)
    assert np.abs(found - full).max() <= 1e-6 * np.abs(full).max()
    assert (found[:3].argmax(0) == full[:3].argmax(0)).all()
    if "mirrored" in name:
        alone = whole(network.network, array)
        assert np.abs(found - alone).max() > 1e-2 * np.abs(alone).max()


def test_a_network_of_planes_sees_every_plane_alone(tmp_path: Path) -> None:
    network, array = OnPlanes(make((8, 8), mixer="s6")).eval(), noise(SHAPE)
    found, _ = streamed(network, array, tmp_path, 4)
    planes = np.concatenate([whole(network, array[:, z : z + 1]) for z in range(SHAPE[0])], axis=1)
    assert np.array_equal(found, planes)


def test_maps_of_a_fold_are_gone_before_the_next(tmp_path: Path) -> None:
    one, four = (scratch_numbers(plan(MeanOfFolds(folds(n)), 2, SHAPE)) for n in (1, 4))
    scores = 3 * 22 * 10 * 10
    assert four - one <= 4 * scores


def test_a_kill_between_members_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, array = Mirrored(MeanOfFolds(folds()), (0,)).eval(), noise(SHAPE)
    straight, notes = streamed(network, array, tmp_path, 7)
    lines, resumed = 0, None

    def die(name: str, path: Path) -> None:
        nonlocal lines
        lines += 1
        if lines % 25 == 0:
            raise Killed

    monkeypatch.setattr(scratch, "step", die)
    while resumed is None:
        try:
            resumed, again = streamed(network, array, tmp_path, 7, key="case")
        except Killed:
            continue
    assert lines > 50
    assert np.array_equal(resumed, straight)
    assert again.taken_over > 0
    assert again.slabs + again.taken_over == notes.slabs
