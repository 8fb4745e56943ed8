"""The change demo's landscape: what it says changed is what differs, the same every time; its run file is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.demo import change as demo_change
from pipelines.demo.change import SCENE, SEASONS, TILES, build, places, scenes, score
from pipelines.learning.change_run import ChangeRun, load_run


def test_only_houses_that_come_or_go_are_change() -> None:
    before, after, truth = scenes((96, 96), np.random.default_rng(5))
    again = scenes((96, 96), np.random.default_rng(5))
    assert all(np.array_equal(a, b) for a, b in zip((before, after, truth), again, strict=True))
    (gain, offset), (other_gain, other_offset) = SEASONS
    same_season = (after.astype(float) - other_offset) / other_gain * gain + offset
    red = np.abs(same_season - before)[..., 0]
    assert 0 < (truth > 0).mean() < 0.4
    assert np.median(red[truth > 0]) > 3 * np.median(red[truth == 0])


def test_build_writes_a_levir_folder_and_two_scenes(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(demo_change, "TILES", {"train": 2, "val": 1})
    monkeypatch.setattr(demo_change, "SCENE", (64, 80))
    seen: list[tuple[int, int]] = []
    made = build(tmp_path, progress=lambda done, all_: seen.append((done, all_)))
    assert made == places(tmp_path)
    assert seen[-1] == (4, 4)
    run_file = tmp_path / "run.toml"
    run_file.write_bytes(Path(demo_change.__file__).with_name("demo_change.toml").read_bytes())
    run = load_run(run_file, dataset=made.tiles, output=tmp_path / "out")
    assert isinstance(run, ChangeRun)
    assert run.found.layout == "levir"
    assert [row.split for row in run.found.rows] == ["train", "train", "validation"]
    assert run.network_config["in_channels"] == 6
    assert score(made.before, made.truth)["true_hectares"] >= 0
    assert (SCENE, sum(TILES.values())) == ((512, 640), 32)  # what the demo really makes
