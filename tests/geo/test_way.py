"""Two files to a COG through the house's own window loop: nothing of the loop knows that it reads the earth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geo.align import align
from geo.formats.geotiff import CogSink, class_layer
from geo.quality import MaskingSink, QualitySource
from geo.radiometry import StretchedSource, common_stretch
from geo.raster import RasterSource
from medmamba.infer import infer
from medmamba.sample import Image
from medmamba.source import Sink, Source, StackedSource, read_all
from medmamba.windows import Window, Windowing
from tests.geo.maker import texture, transform, write_tif

WINDOWING = Windowing(size=(48, 48), overlap=(16, 16), weights="ramp")


class Difference(nn.Module):
    """Scores of (no change, change) from two one-band dates: a network with a receptive field of one cell."""

    def forward(self, pair: Tensor) -> Tensor:
        far = (pair[:, :1] - pair[:, 1:]).abs()
        return torch.cat([torch.full_like(far, 0.3), far], dim=1)


class Decoded:
    """Scores to classes on the way out; gone after `most` slabs, as a killed process is."""

    def __init__(self, sink: Sink, most: int = 1000) -> None:
        self.sink, self.left = sink, most

    def write(self, window: Window, array: np.ndarray) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.sink.write(window, array.argmax(axis=0)[None].astype("uint8"))

    def close(self) -> None:
        self.sink.close()


@pytest.fixture
def dates(tmp_path: Path) -> tuple[Source, Source]:
    ground = np.clip(texture((200, 170)) * 255, 1, 255).astype("uint8")
    after = 256 - ground.astype(int)
    after[:, :100] = ground[:, :100]
    after[:, 30:50, 20:40] = 0
    one = write_tif(tmp_path / "before.tif", ground, nodata=0)
    two = write_tif(tmp_path / "after.tif", after.clip(0, 255).astype("uint8"), nodata=0,
                    transform=transform(10, 400_003.0, 5_000_002.0))  # fmt: skip
    return align([RasterSource(one), RasterSource(two)]).sources


def run(dates: tuple[Source, Source], path: Path, most: int = 1000) -> int:
    """The raster at `path`; returns the row it began with."""
    stretch = common_stretch(dates)
    pair = StackedSource(*(StretchedSource(d, stretch) for d in dates))
    cog = CogSink(path, pair.grid, class_layer({0: "no change", 1: "change"}, {1: (255, 0, 0)}), key="k")
    sink = Decoded(MaskingSink(cog, [QualitySource(d) for d in dates]), most)
    first = cog.finished(Window.whole(pair.grid.shape))
    infer(Difference(), pair, sink, classes=2, windowing=WINDOWING, sums=torch.float64, finished=cog.finished)
    sink.close()
    return first


def test_the_map_is_what_the_network_says_cell_by_cell(dates: tuple[Source, Source], tmp_path: Path) -> None:
    run(dates, tmp_path / "change.tif")
    stretch = common_stretch(dates)
    images: list[Image] = [read_all(StretchedSource(d, stretch)) for d in dates]
    far = np.abs(images[0].array - images[1].array)[0]
    valid = np.logical_and(*(np.ones(far.shape, bool) if i.valid is None else i.valid for i in images))
    found = read_all(RasterSource(tmp_path / "change.tif"))
    sure = valid & (np.abs(far - 0.3) > 1e-6)
    np.testing.assert_array_equal(found.array[0][sure], far[sure] > 0.3)
    np.testing.assert_array_equal(found.valid, valid)
    assert 0 < (~valid).sum() < valid.size / 2
    assert (found.array == 1).sum() > 0


def test_an_interrupted_scene_goes_on_in_the_middle(dates: tuple[Source, Source], tmp_path: Path) -> None:
    run(dates, tmp_path / "whole.tif")
    with pytest.raises(KeyboardInterrupt):
        run(dates, tmp_path / "cut.tif", most=3)
    assert not (tmp_path / "cut.tif").exists()
    assert run(dates, tmp_path / "cut.tif") >= 32
    assert (tmp_path / "cut.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after.tif", "before.tif", "cut.tif", "whole.tif"]
