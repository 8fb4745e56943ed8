"""`--mode stream` on real files: the labels of the network shown the whole image; a kill in the product goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geo.formats.geotiff import CogSink, class_layer
from geo.radiometry import StretchedSource, common_stretch
from geo.raster import RasterSource
from medmamba.nets.mamba_unet import MambaUNet, MambaUNetConfig
from medmamba.source import Sink, read_all
from medmamba.stream import StreamNotes, stream
from medmamba.windows import Window
from pipelines.cases.formats import open_source
from pipelines.networks import NETWORKS
from pipelines.serving.predict import Predictor, predict_labels
from tests.ways.tiny import make_bundle

SMALL: dict[str, Any] = {"widths": (2, 4), "depths": (1, 1), "state": 1, "mixer": "s6"}


@pytest.mark.parametrize("name", ["example_ct_sm", "example_ct"])
def test_a_streamed_ct_has_the_labels_of_the_whole_image(shared: Path, tmp_path: Path, name: str) -> None:
    path = shared / "data" / "ct_totalseg" / f"{name}.nii.gz"
    bundle = make_bundle(tmp_path / "bundle", **SMALL)
    labels = predict_labels(Predictor.load(bundle, device="cpu", mode="stream"), {"ct": open_source(path)})[0]
    source = open_source(path)
    seen = read_all(bundle.preprocessing.forward({"ct": source})).array
    assert seen[0].size > 20 * 12**3  # many windows, several slabs
    with torch.no_grad():
        scores = bundle.build(NETWORKS)(torch.from_numpy(seen)[None])[0].numpy()
    order, flips = bundle.preprocessing.axes(source.grid)
    turned = labels.transpose(order)[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
    assert np.array_equal(turned, scores.argmax(0))
    assert len(np.unique(labels)) > 1


class Classes:
    """Scores in, the largest one's number out; gone after `most` slabs, as a killed process is."""

    def __init__(self, sink: Sink, most: int) -> None:
        self.sink, self.left = sink, most

    def write(self, window: Window, array: np.ndarray) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.sink.write(window, array.argmax(0)[None].astype(np.uint8))

    def close(self) -> None:
        self.sink.close()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return MambaUNet(MambaUNetConfig(spatial_dims=2, in_channels=3, out_channels=3, **SMALL)).eval()


def test_a_streamed_scene_has_the_labels_of_the_whole_scene_and_goes_on_after_a_kill(
    shared: Path, tmp_path: Path, network: nn.Module
) -> None:
    scene = RasterSource(shared / "data" / "satellite" / "rio_RGB.byte.tif")
    source = StretchedSource(scene, common_stretch([scene]))

    def run(path: Path, most: int = 1000) -> StreamNotes:
        cog = CogSink(path, source.grid, class_layer({0: "a", 1: "b", 2: "c"}, {}), key="k")
        sink = Classes(cog, most)
        made = stream(network, source, sink, scratch=tmp_path / "maps", key=path.name, rows=64, finished=cog.finished)
        sink.close()
        return made

    notes = run(tmp_path / "whole.tif")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.tif", most=5)
    resumed = run(tmp_path / "cut.tif")
    assert resumed.slabs + resumed.taken_over == notes.slabs
    assert resumed.slabs == -(-source.grid.shape[0] // 64) - 5  # rows in the product are not made again
    assert (tmp_path / "cut.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    image = read_all(source).array
    rows, columns = image.shape[1:]
    padded = np.pad(image, ((0, 0), (0, -rows % 2), (0, -columns % 2)), mode="edge")
    with torch.no_grad():
        scores = network(torch.from_numpy(padded)[None])[0, :, :rows, :columns].numpy()
    found = read_all(RasterSource(tmp_path / "whole.tif")).array[0]
    assert np.array_equal(found, scores.argmax(0))
    assert len(np.unique(found)) > 1
