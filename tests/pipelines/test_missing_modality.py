"""A role that is not there: hidden now and then in training, 0 at prediction and told; else the case is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.bundle import save_bundle
from medmamba.errors import ConfigError, InputError
from medmamba.preprocessing import Preprocessing
from medmamba.source import read_all
from pipelines.cases.case import Case
from pipelines.config import AugmentSection, PreprocessingSection
from pipelines.learning.sampling import Prepared, Sampler, open_source
from pipelines.networks import NETWORKS
from pipelines.serving.forecast import case_forecast
from pipelines.serving.predict import Predictor, predict
from tests.ways.tiny import make_bundle, write_volume

GIB = 2**30


def bundle_of(folder: Path, dropout: float) -> Predictor:
    """Two roles, hidden in training with the chance `dropout`."""
    plain = make_bundle(folder / "plain", roles=("t1", "flair"))
    contract = replace(plain.preprocessing, modality_dropout=dropout)
    values = {"network": plain.network, "config": plain.config, "task": plain.task, "preprocessing": contract}
    states = [NETWORKS[plain.network](plain.config).state_dict()]
    return Predictor.load(save_bundle(folder / "bundle", name="two", states=states, **values), device="cpu")


@pytest.mark.parametrize("lacking", ["t1", "flair"])
def test_a_missing_role_is_zero_and_told(tmp_path: Path, lacking: str) -> None:
    files = {role: write_volume(tmp_path / f"{role}.nii.gz", seed) for seed, role in enumerate(("t1", "flair"))}
    given = {role: path for role, path in files.items() if role != lacking}
    trained = bundle_of(tmp_path / "a", 0.2)
    seen = read_all(trained.bundle.preprocessing.forward({r: open_source(p) for r, p in given.items()}))
    whole = read_all(trained.bundle.preprocessing.forward({r: open_source(p) for r, p in files.items()}))
    at = seen.channels.index(lacking)
    assert seen.channels == ("t1", "flair")
    assert not seen.array[at].any()
    assert np.array_equal(seen.array[1 - at], whole.array[1 - at])
    report = predict(trained, Case(id="a", files=given), tmp_path / "out")
    assert report.status == "done"
    assert any(f"['{lacking}'] are missing" in warning for warning in report.warnings)
    assert set(report.inputs) == set(given)
    complete = predict(trained, Case(id="a", files=files), tmp_path / "out")
    assert not any("missing" in warning for warning in complete.warnings)
    assert complete.key != report.key
    assert case_forecast(Case(id="a", files=given), trained.bundle, GIB).code is None


def test_without_training_for_it_the_case_is_refused(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "t1.nii.gz")
    plain = bundle_of(tmp_path / "a", 0.0)
    with pytest.raises(InputError) as told:
        predict(plain, Case(id="a", files={"t1": path}), tmp_path / "out")
    assert told.value.code == "missing_channel"
    assert case_forecast(Case(id="a", files={"t1": path}), plain.bundle, GIB).code == "missing_channel"
    with pytest.raises(InputError) as told:  # nothing of what the bundle knows is there
        predict(bundle_of(tmp_path / "b", 0.5), Case(id="a", files={"t2": path}), tmp_path / "out")
    assert told.value.code == "missing_channel"


def test_training_hides_channels_as_often_as_asked_but_never_all() -> None:
    image = np.ones((3, 6, 6, 6), np.float32)
    case = Prepared(id="a", image=image, labels=np.zeros((6, 6, 6), np.int8), places={})
    off = AugmentSection(flip=0, affine=0, gamma=0, scale=0, noise=0)
    values = {"batch": 2, "foreground_share": 0.0, "augment": off, "seed": 0}
    some = Sampler([case], (4, 4, 4), modality_dropout=0.3, **values)
    drawn = torch.cat([some.draw(step).image for step in range(200)])
    shown = drawn.flatten(2).amax(2)
    assert torch.equal(shown, drawn.flatten(2).amin(2))  # a channel is hidden whole
    assert shown.any(1).all()
    assert float((shown == 0).float().mean()) == pytest.approx(0.3 - 0.3**3 / 3, abs=0.04)  # 1200 draws: std 0.013
    assert torch.equal(some.draw(7).image, some.draw(7).image)
    never = Sampler([case], (4, 4, 4), **values)
    assert all(bool(never.draw(step).image.all()) for step in range(20))
    often = Sampler([case], (4, 4, 4), modality_dropout=0.99, **values)
    assert all(bool((b.image.flatten(1).any(1)).all()) for b in map(often.draw, range(20)))


def test_the_contract_keeps_it(tmp_path: Path) -> None:
    section = PreprocessingSection.model_validate(
        {"channels": [{"role": "a"}, {"role": "b"}], "window": [8, 8, 8], "modality_dropout": 0.2}
    )
    contract = section.contract()
    assert contract.modality_dropout == 0.2
    assert Preprocessing.from_json(contract.to_json()) == contract
    with pytest.raises(ConfigError, match="modality_dropout 1 is a share"):
        replace(contract, modality_dropout=1)
