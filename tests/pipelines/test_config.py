"""The run file: all faults at once, labels become classes, paths count from the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from medmamba.errors import ConfigError
from pipelines.config import TrainRun
from tests.pipelines.cohort_maker import run_values

RUN = """
name = "liver"
manifest = "cohort/manifest.csv"
output = "out"
epochs = 4
[network]
widths = [8, 16]
depths = [1, 1]
[preprocessing]
window = [16, 16, 16]
[[preprocessing.channels]]
role = "ct"
clip = [-200, 300]
scaling = "fixed"
scale = 100.0
[labels]
5 = "liver"
1 = "spleen"
"""


def test_a_toml_file_becomes_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    run = TrainRun.load(path, epochs=7, batch=None)
    assert run.epochs == 7
    assert run.batch == 2
    assert run.manifest == tmp_path / "cohort/manifest.csv"
    assert run.task == {"name": "segmentation", "labels": {"1": "spleen", "2": "liver"}, "values": {"1": 1, "2": 5}}
    assert run.network_config == {
        "widths": [8, 16], "depths": [1, 1], "in_channels": 1, "out_channels": 3, "spatial_dims": 3
    }  # fmt: skip
    contract = run.preprocessing.contract()
    assert contract.windowing.overlap == (8, 8, 8)
    assert contract.channels[0].clip == (-200.0, 300.0)
    assert type(contract).from_json(contract.to_json()) == contract


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    values = run_values(tmp_path / "m.csv", tmp_path, epoch=3, batch=0, labels={"0": "air"}, name="a/b")
    values["preprocessing"]["overlap"] = [12, 0, 0]
    del values["manifest"]
    with pytest.raises(ConfigError) as told:
        TrainRun.check(values)
    text = str(told.value)
    for part in ("6 faults", "epoch: unknown key", "batch:", "labels:", "name:", "manifest: Field required", "overlap"):
        assert part in text


def test_a_run_is_frozen(tmp_path: Path) -> None:
    run = TrainRun.check(run_values(tmp_path / "m.csv", tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        run.batch = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["name = ", "[[["])
def test_broken_toml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml: not readable as TOML"):
        TrainRun.load(path)
    with pytest.raises(ConfigError, match="no such run file"):
        TrainRun.load(tmp_path / "absent.toml")


def test_codes_of_labels_go_into_the_bundle(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN + '[codes.5]\ntype = ["SCT", "10200004", "Liver"]\n')
    task = TrainRun.load(path).task
    anatomy = ["SCT", "123037004", "Anatomical Structure"]
    assert task["codes"] == {"2": {"type": ["SCT", "10200004", "Liver"], "category": anatomy}}
    path.write_text(RUN + '[codes.4]\ntype = ["SCT", "10200004", "Liver"]\n')
    with pytest.raises(ConfigError, match="no labels"):
        TrainRun.load(path)
