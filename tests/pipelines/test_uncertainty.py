"""Disagreement of folds and mirrorings: its value, that it leaves the labels alone, and the way to file and page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmamba.bundle import Bundle, save_bundle
from medmamba.ensemble import OUTPUTS, Disagreement, Moments
from medmamba.formats.nifti import read_labels
from medmamba.source import read_all
from pipelines.cases.case import Case
from pipelines.learning.sampling import open_source
from pipelines.networks import NETWORKS
from pipelines.pages.report import judge
from pipelines.report import Report
from pipelines.serving.predict import Predictor, predict, predict_labels
from tests.ways.tiny import make_bundle, write_volume


class Says(nn.Module):
    """The same scores for every cell."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores[None, :, None, None].expand(len(x), -1, *x.shape[2:])


def disagreement(outputs: str, *members: nn.Module) -> float:
    chosen = OUTPUTS[outputs]
    found = Disagreement(Moments(members, chosen), chosen)(torch.zeros(1, 1, 2, 2))
    assert found.shape[1] == members[0](torch.zeros(1, 1, 1, 1)).shape[1] + 1
    return float(found[0, -1, 0, 0])


def test_disagreement_is_mutual_information() -> None:
    one, other, unsure = Says(30.0, 0.0, 0.0), Says(0.0, 30.0, 0.0), Says(1.0, 1.0, 0.0)
    assert disagreement("softmax", one, other) == pytest.approx(1.0, abs=1e-5)  # two sure ones, two labels: 1 bit
    assert disagreement("softmax", unsure, unsure, unsure) == pytest.approx(0.0, abs=1e-6)  # agreed, however unsure
    quarter = disagreement("softmax", one, one, one, other)
    assert quarter == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), abs=1e-5)
    assert disagreement("sigmoid", Says(30.0, 30.0), Says(-30.0, 30.0)) == pytest.approx(0.5, abs=1e-5)  # one of two


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three untrained folds of the tiny bundle, mirrored along one axis."""
    folder = tmp_path_factory.mktemp("bundle")
    plain = make_bundle(folder / "one")
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append({k: 3 * v for k, v in NETWORKS[plain.network](plain.config).state_dict().items()})
    contract = replace(plain.preprocessing, mirror=(2,))
    values = {"network": plain.network, "config": plain.config, "task": plain.task, "preprocessing": contract}
    return save_bundle(folder / "three", name="three", states=states, **values)


def test_labels_are_those_without_the_map(folds: Bundle, tmp_path: Path) -> None:
    assert folds.members == 6
    sources = {"ct": open_source(write_volume(tmp_path / "a.nii.gz", size=14))}
    told = Predictor.load(folds, device="cpu")
    plain = replace(told, network=folds.build(NETWORKS))
    assert (told.maps, plain.maps) == (4, 3)
    found, _ = predict_labels(told, sources)
    assert len(np.unique(found)) > 1
    assert np.array_equal(found, predict_labels(plain, sources)[0])


def test_the_map_lies_beside_the_labels_and_its_means_in_the_report(folds: Bundle, tmp_path: Path) -> None:
    path = write_volume(tmp_path / "a.nii.gz", size=14)
    report = predict(Predictor.load(folds, device="cpu"), Case(id="a", files={"ct": path}), tmp_path / "out")
    name = "a_disagreement.nii.gz"
    assert list(report.outputs)[:2] == ["a_dseg.nii.gz", name]
    folder = tmp_path / "out" / folds.title
    percent, grid = read_labels(folder / name)
    labels, other = read_labels(folder / "a_dseg.nii.gz")
    assert grid == other
    assert 0 < percent.max() <= 100
    for value, row in report.numbers["labels"].items():
        inside = percent[labels == int(value)]
        assert row["disagreement"] == (pytest.approx(inside.mean()) if inside.size else None)
    assert nib.load(folder / name).header["intent_code"] == 0
    assert nib.load(folder / "a_dseg.nii.gz").header["intent_code"] == 1002
    single = predict(
        Predictor.load(make_bundle(tmp_path / "one"), device="cpu"), Case(id="a", files={"ct": path}), tmp_path / "out"
    )
    assert name not in single.outputs
    assert "disagreement" not in json.dumps(dict(single.numbers))


def test_a_streamed_ensemble_tells_it_too(folds: Bundle, tmp_path: Path) -> None:
    """Folds and mirrorings of the whole volume, in one piece."""
    path = write_volume(tmp_path / "a.nii.gz", size=14)
    case = Case(id="a", files={"ct": path})
    report = predict(Predictor.load(folds, device="cpu", mode="stream"), case, tmp_path / "out")
    percent, _ = read_labels(tmp_path / "out" / folds.title / "a_disagreement.nii.gz")
    labels, _ = read_labels(tmp_path / "out" / folds.title / "a_dseg.nii.gz")
    source = open_source(path)
    seen = read_all(folds.preprocessing.forward({"ct": source})).array
    with torch.no_grad():
        found = folds.build_with_disagreement(NETWORKS)(torch.from_numpy(seen)[None])[0].numpy()
    assert np.array_equal(labels, found[:3].argmax(0))
    assert np.abs(percent - 100 * found[3]).max() <= 0.5 + 1e-3
    assert 0 < percent.max() <= 100
    assert report.run["passes"] > folds.members


def test_disagreement_orders_the_page() -> None:
    def case(percent: float | None) -> Report:
        row = {"name": "organ", "voxels": 9, "volume_ml": 1.0, "truncated": False, "disagreement": percent}
        return Report(case="a", key="k", status="done", bundle={}, inputs={}, numbers={"labels": {"1": row}})

    calm, unsure, none = judge([case(2.0), case(40.0), case(None)])
    assert unsure.points > calm.points > none.points == 0
    assert unsure.reasons == ("the folds or mirrorings disagree on organ (40 % of a bit a voxel)",)
    assert not calm.reasons
