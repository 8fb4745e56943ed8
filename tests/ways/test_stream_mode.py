"""`--mode stream` from file to labels: what the network says of the whole image, under a key of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flows import batch
from flows.batch import WELL, run_batch
from flows.work import run_in_order
from medmamba.formats.nifti import read_labels
from medmamba.source import read_all
from pipelines.cases.formats import open_source
from pipelines.cases.state import STATE
from pipelines.networks import NETWORKS
from pipelines.report import Report
from tests.ways.tiny import make_bundle, write_volume


def test_a_streamed_batch_gives_the_labels_of_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)
    bundle, said = make_bundle(tmp_path / "bundle"), list[str]()
    path = write_volume(tmp_path / "in" / "a.nii.gz", size=30)  # larger than the window, more than one slab
    asked = {"input": path.parent, "bundle": str(bundle.folder), "output": tmp_path / "out", "settle": 0}
    assert run_batch(echo=said.append, runner=run_in_order, mode="stream", **asked) == WELL
    labels, _ = read_labels(tmp_path / "out" / bundle.title / "a_dseg.nii.gz")
    seen = read_all(bundle.preprocessing.forward({"ct": open_source(path)})).array
    with torch.no_grad():
        scores = bundle.build(NETWORKS)(torch.from_numpy(seen)[None])[0].numpy()
    assert np.array_equal(labels, scores.argmax(0))
    report = Report.load(tmp_path / "out" / bundle.title / "a_dseg.json")
    assert report is not None
    assert report.run["mode"] == "stream"
    assert report.run["slabs"] > report.run["passes"]
    assert not list((tmp_path / "out" / STATE / "stream").rglob("*.map"))
    assert any(line.startswith("memory: ") for line in said)
    said.clear()
    assert run_batch(echo=said.append, runner=run_in_order, mode="stream", **asked) == WELL
    assert "nothing due" in said[0]
    run_batch(echo=said.append, runner=run_in_order, **asked)  # windows are another result
    again = Report.load(tmp_path / "out" / bundle.title / "a_dseg.json")
    assert again is not None
    assert again.key != report.key
    assert again.run["mode"] == "windows"
