"""Little memory: the batch halved, then the CPU, then set aside, each step told; nothing shown, read or done twice."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmamba import scratch
from medmamba.bundle import Bundle
from medmamba.errors import InputError
from medmamba.formats import mapped
from medmamba.formats.nifti import read_labels
from medmamba.infer import infer
from medmamba.source import ArraySink
from medmamba.windows import Windowing
from pipelines.cases.archive import Item
from pipelines.cases.case import Case
from pipelines.serving.predict import Predictor, predict
from pipelines.serving.process import Workplace, process_case
from tests.medmamba.test_windows import source_of
from tests.ways.tiny import make_bundle, write_volume


class Hungry(nn.Module):
    """Runs out of memory above `most` windows, and at once anywhere but on the CPU."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most or x.device.type != "cpu":
            raise torch.OutOfMemoryError("made up: out of memory")
        return self.network(x)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def test_every_rung_of_the_ladder_is_told_in_its_order() -> None:
    array = np.random.default_rng(3).normal(size=(1, 40)).astype(np.float32)
    windowing, sink = Windowing(size=(4,), overlap=(2,)), ArraySink(1, (40,))
    network = Hungry(nn.Identity(), most=2)
    notes = infer(network, source_of(array), sink, classes=1, windowing=windowing, batch=4, device="meta")
    assert notes.steps == [
        "out of memory on meta: batch 2",
        "out of memory on meta: batch 1",
        "out of memory with batch 1: moved to the CPU",
    ]
    assert (notes.device, notes.batch) == ("cpu", 1)
    np.testing.assert_allclose(sink.array, array, atol=1e-6)
    with pytest.raises(InputError, match="one window does not fit") as caught:
        infer(Hungry(nn.Identity(), 0), source_of(array), sink, classes=1, windowing=windowing, batch=2, device="meta")
    assert caught.value.code == "too_large"


def test_the_report_tells_each_step_and_the_labels_are_the_same(bundle: Bundle, tmp_path: Path) -> None:
    case = Case(id="a", files={"ct": write_volume(tmp_path / "a.nii.gz", size=30)})
    plain = Predictor.load(bundle, device="cpu")
    predict(plain, case, tmp_path / "plain")
    hungry = replace(plain, network=Hungry(plain.network, most=1), batch=4)
    report = predict(hungry, case, tmp_path / "hungry")
    steps = [warning for warning in report.warnings if "out of memory" in warning]
    assert steps == ["out of memory on cpu: batch 2", "out of memory on cpu: batch 1"]
    name = "a_dseg.nii.gz"
    assert report.run["batch"] == 1
    assert (tmp_path / "plain" / bundle.title / name).read_bytes() == (
        tmp_path / "hungry" / bundle.title / name
    ).read_bytes()


def test_what_fits_nowhere_is_set_aside(bundle: Bundle, tmp_path: Path) -> None:
    case = Case(id="a", files={"ct": write_volume(tmp_path / "a.nii.gz", size=30)})
    plain = Predictor.load(bundle, device="cpu")
    place = Workplace(
        predictor=replace(plain, network=Hungry(plain.network, most=0)), output=tmp_path / "out", memory=2**40
    )
    (tmp_path / "out").mkdir()
    report = process_case(place, Item(case=case, key="k"))
    assert (report.status, report.code) == ("set_aside", "too_large")
    assert "one window does not fit" in str(report.message)


def test_windows_below_the_threshold_of_the_contract_are_background_unseen(tmp_path: Path, bundle: Bundle) -> None:
    import nibabel as nib

    values = np.zeros((36, 12, 12), np.int16)
    values[24:] = np.random.default_rng(0).integers(100, 1000, (12, 12, 12))
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    contract = replace(bundle.preprocessing, windowing=replace(bundle.preprocessing.windowing, skip_below=0.0))
    seen: list[int] = []
    plain = Predictor.load(bundle, device="cpu")
    plain.network.register_forward_hook(lambda module, shown, out: seen.append(len(shown[0])))
    case = Case(id="a", files={"ct": path})
    skipping = replace(plain, bundle=replace(bundle, preprocessing=contract))
    report = predict(skipping, case, tmp_path / "out")
    assert (report.run["windows"], report.run["windows_skipped"], sum(seen)) == (3, 2, 1)
    labels, _ = read_labels(tmp_path / "out" / skipping.bundle.title / "a_dseg.nii.gz")
    assert not labels[:, :, :24].any()  # labels are z, y, x of a file in x, y, z
    assert predict(plain, case, tmp_path / "all").run["windows_skipped"] == 0


def test_a_gzip_is_read_once_from_front_to_back(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_volume(tmp_path / "a.nii.gz", size=30)
    told: list[tuple[int, int]] = []

    class Watched(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            at, piece = self.tell(), super().read(size)
            told.append((at, len(piece)))
            return piece

        def seek(self, offset: int, whence: int = 0) -> int:
            assert (offset, whence) == (0, 1)  # asks where it is
            return super().seek(offset, whence)

    watching = SimpleNamespace(open=Watched, BadGzipFile=gzip.BadGzipFile)
    monkeypatch.setattr(mapped, "gzip", watching)  # of the voxels; the header is read apart
    monkeypatch.setattr(mapped, "PIECE", 1000)
    predict(Predictor.load(bundle, device="cpu"), Case(id="a", files={"ct": path}), tmp_path / "out")
    with gzip.GzipFile(path) as whole:
        size = len(whole.read())
    starts = [at for at, count in told if count]
    assert starts == list(range(0, size, 1000))  # every piece once, in order


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_volume_killed_inside_is_gone_on_with(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed: the slab whose journal line was not written is done twice, no other; the file is the same."""
    case = Case(id="a", files={"ct": write_volume(tmp_path / "a.nii.gz", size=30)})
    predictor = Predictor.load(bundle, device="cpu", mode="stream")
    whole = predict(predictor, case, tmp_path / "whole")
    real, lines = scratch.Journal.add, list[tuple[str, int]]()

    def torn(journal: scratch.Journal, name: str, slab: int) -> None:
        lines.append((name, slab))
        if len(lines) in (7, 12):
            raise Killed
        real(journal, name, slab)

    monkeypatch.setattr(scratch.Journal, "add", torn)
    for _ in range(2):
        with pytest.raises(Killed):
            predict(predictor, case, tmp_path / "cut")
    resumed = predict(predictor, case, tmp_path / "cut")
    twice = [line for line in dict.fromkeys(lines) if lines.count(line) > 1]
    assert twice == [lines[6], lines[11]]  # one a kill
    assert resumed.run["slabs"] + resumed.run["taken_over"] == whole.run["slabs"]
    assert resumed.run["taken_over"] == 10
    for name in ("a_dseg.nii.gz", "a_dseg.png"):
        ways = (tmp_path / way / bundle.title / name for way in ("whole", "cut"))
        assert len({file.read_bytes() for file in ways}) == 1
