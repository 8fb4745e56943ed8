"""A streamed case told before it runs, by `medmamba plan` and `predict`; a pair by the strips it is made in."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets.unet import UNet
from typer.testing import CliRunner

from flows.cli import app
from medmamba.bundle import save_bundle
from medmamba.errors import ConfigError, InputError
from medmamba.formats.nifti import read_labels
from medmamba.source import read_all
from medmamba.stream_plan import require_streamable
from pipelines.cases import pair_archive
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source
from pipelines.networks import NETWORKS
from pipelines.report import Report
from pipelines.serving.budget import KERNELS, loop_bytes, predicted_bytes, predicted_scratch, streamed
from pipelines.serving.pair_view import STRIP
from pipelines.serving.predict import Predictor, predict
from tests.ways import tiny_pair
from tests.ways.tiny import make_bundle, write_volume

Usage = namedtuple("Usage", "total used free")


def test_scratch_and_slab_grow_as_they_should(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    short, long, wide = (streamed(bundle, shape) for shape in ((48, 32, 32), (96, 32, 32), (48, 64, 64)))
    assert long.slab == short.slab
    assert wide.slab == pytest.approx(4 * short.slab, rel=0.01)
    assert long.scratch == 2 * short.scratch
    assert loop_bytes(bundle, (48, 32, 32), "stream") == pytest.approx(KERNELS + short.slab, rel=0.01)


def test_what_streaming_takes_is_told_before_and_refused_when_the_disk_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, path = make_bundle(tmp_path / "bundle"), write_volume(tmp_path / "in" / "a.nii.gz", size=30)
    case, out = Case(id="a", files={"ct": path}), tmp_path / "out"
    scratch = predicted_scratch(bundle, case, "stream")
    assert scratch > 2 * 4 * 30**3
    assert predicted_scratch(bundle, case, "windows") == 0
    common = ["--bundle", str(bundle.folder), "--output", str(out), "--mode", "stream"]
    told = CliRunner().invoke(app, ["plan", str(path.parent), *common])
    assert told.exit_code == 0, told.output
    needed = predicted_bytes(bundle, case, "stream")
    assert f"memory: {needed / 2**20:.0f} MiB" in told.output
    assert f"scratch: {scratch / 2**20:.1f} MiB" in told.output
    done = CliRunner().invoke(app, ["predict", str(path), *common, "--device", "cpu", "--ram", str(needed)])
    assert done.exit_code == 0, done.output
    assert f"+ {needed / 2**20:.0f} MiB for the largest case streamed" in done.output
    assert "memory at most" in done.output
    refused = CliRunner().invoke(app, ["predict", str(path), *common, "--device", "cpu", "--ram", str(needed - 1)])
    assert "raise --ram" in f"{refused.output}{refused.exception}"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 0, 6 * 30**3 + 2**20 + scratch - 1))
    predict(Predictor.load(bundle, device="cpu"), case, tmp_path / "windows")
    with pytest.raises(InputError, match="free some disk") as caught:
        predict(Predictor.load(bundle, device="cpu", mode="stream"), case, tmp_path / "full")
    assert caught.value.code == "no_space"


def test_a_pair_takes_the_memory_of_a_strip_however_wide_it_is(tmp_path: Path) -> None:
    bundle = tiny_pair.make_bundle(tmp_path / "bundle")
    narrow, wide, wider = (loop_bytes(bundle, (900, n), "windows", STRIP) for n in (STRIP // 2, 3 * STRIP, 9 * STRIP))
    assert wide == wider
    assert 1.9 < wide / narrow < 2.2
    before, after = tiny_pair.write_pair(tmp_path)
    case = Case(id="a", files={"before": before, "after": after})
    loop = loop_bytes(bundle, tiny_pair.SIZE, "windows", STRIP)
    assert pair_archive.predicted_bytes(bundle, case) == pair_archive.READING + loop


def test_a_monai_network_streams_from_file_to_labels(tmp_path: Path) -> None:
    """Instance norms of MONAI's U-Net, over the whole volume."""
    tiny = make_bundle(tmp_path / "tiny")
    config = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2]}
    torch.manual_seed(0)
    values = {"preprocessing": tiny.preprocessing, "task": tiny.task}
    bundle = save_bundle(
        tmp_path / "monai", name="unet", network="unet", config=config, states=[UNet(**config).state_dict()], **values
    )
    path = write_volume(tmp_path / "a.nii.gz", size=30)
    report = predict(
        Predictor.load(bundle, device="cpu", mode="stream"), Case(id="a", files={"ct": path}), tmp_path / "out"
    )
    labels, _ = read_labels(tmp_path / "out" / bundle.title / "a_dseg.nii.gz")
    seen = read_all(bundle.preprocessing.forward({"ct": open_source(path)})).array
    with torch.no_grad():
        scores = bundle.build(NETWORKS)(torch.from_numpy(seen)[None])[0].numpy()
    assert np.array_equal(labels, scores.argmax(0))
    assert len(np.unique(labels)) > 1
    assert Report.load(tmp_path / "out" / bundle.title / "a_dseg.json") is not None
    assert report.run["passes"] > 2
    swin = {"in_channels": 1, "out_channels": 3, "feature_size": 12}
    with pytest.raises(ConfigError, match="use windows"):
        require_streamable(NETWORKS["swinunetr"](swin), 1, 3)
