"""The COG sink: valid, whole or absent, resumed after a kill, and its memory does not know the size of the scene."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rio_cogeo import cog_validate

from geo.formats.geotiff import CogSink, Layer, class_layer, confidence_layer, disk_needed
from geo.raster import RasterSource
from medmamba.errors import ConfigError, InputError, ShapeError
from medmamba.grid import Grid
from medmamba.source import read_all
from medmamba.windows import Window
from tests.geo.maker import grid, texture

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {1: (255, 0, 0), 2: (0, 0, 255)}
LAYER = class_layer({0: "no change", 1: "built", 2: "water"}, COLOURS, model="m@1")


def write(path: Path, array: np.ndarray, layer: Layer, on: Grid | None = None, depth: int = 200) -> None:
    on = on or grid((array.shape[1], array.shape[2]))
    sink = CogSink(path, on, layer, key="k")
    for row in range(0, on.shape[0], depth):
        size = (min(depth, on.shape[0] - row), on.shape[1])
        sink.write(Window(start=(row, 0), size=size), array[:, row : row + size[0]])
    sink.close()


def test_class_raster_is_a_valid_cog(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).choice(np.array([0, 1, 2, 254, 255], dtype="uint8"), (1, 1500, 1100))
    path = tmp_path / "change.tif"
    write(path, codes, LAYER)
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.profile["blockxsize"] == file.profile["blockysize"] == 512
        assert (file.nodata, file.profile["compress"], file.crs.to_epsg()) == (255, "deflate", 32633)
        assert file.colormap(1)[1][:3] == COLOURS[1]
        assert file.descriptions == ("class",)
        tags = file.tags()
        assert (tags["class_1"], tags["class_254"], tags["model"]) == ("built", "not observable", "m@1")
        overview = file.read(1, out_shape=(750, 550))
    assert set(np.unique(overview)) <= {0, 1, 2, 254, 255}  # MODE: no class that is not there
    source = RasterSource(path)
    image = read_all(source)
    np.testing.assert_array_equal(image.array, codes)
    np.testing.assert_array_equal(image.valid, codes[0] != 255)
    assert source.grid == grid((1500, 1100))
    assert [p.name for p in tmp_path.iterdir()] == ["change.tif"]


def test_overview_of_classes_is_the_mode_of_continuous_the_mean(tmp_path: Path) -> None:
    block = np.array([[1, 1], [1, 200]], dtype="uint8")
    array = np.tile(block, (300, 300))[None]
    for layer, expected in ((LAYER, 1), (confidence_layer(), 51)):  # (1 + 1 + 1 + 200) / 4 = 50.75
        write(tmp_path / "a.tif", array, layer)
        with rasterio.open(tmp_path / "a.tif") as file:
            assert set(np.unique(file.read(1, out_shape=(300, 300)))) == {expected}


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_restored_imagery_keeps_type_scale_and_nodata(tmp_path: Path, dtype: str) -> None:
    array = (texture((70, 600), 3) * 100).astype(dtype)
    array[:, 3, 4] = -99 if dtype != "uint16" else 0
    nodata = float(array[0, 3, 4])
    layer = Layer(kind="continuous", dtype=dtype, bands=("b", "g", "r"), nodata=nodata, scale=0.5, offset=3.0)
    write(tmp_path / "a.tif", array, layer)
    assert cog_validate(tmp_path / "a.tif", strict=True)[0]
    source = RasterSource(tmp_path / "a.tif")
    image = read_all(source)
    np.testing.assert_allclose(image.array, array * 0.5 + 3.0)
    assert (source.nodata, source.channels) == (nodata, ("b", "g", "r"))
    assert (~image.valid).sum() == 1


def test_without_georeference_and_rotated(tmp_path: Path) -> None:
    array = np.zeros((1, 30, 40), dtype="uint8")
    write(tmp_path / "a.tif", array, LAYER, Grid((30, 40), np.array([[0, 1, 0.5], [1, 0, 0.5], [0, 0, 1]])))
    assert RasterSource(tmp_path / "a.tif").grid.frame == "pixels"
    turned = Grid((30, 40), np.array([[3.0, 9, 500_000], [-9, 3, 5e6], [0, 0, 1]]), "EPSG:32633")
    write(tmp_path / "b.tif", array, LAYER, turned)
    assert RasterSource(tmp_path / "b.tif").grid.matches(turned)


WHOLE = Window.whole((8, 5))


def test_strips_make_the_same_file_as_whole_rows(tmp_path: Path) -> None:
    array = (texture((70, 600)) * 5).astype("uint8")
    write(tmp_path / "whole.tif", array, LAYER)
    sink = CogSink(tmp_path / "strips.tif", grid((70, 600)), LAYER, key="k")
    for column, width in ((0, 250), (250, 350)):
        for row, again in ((0, 40), (30, 40)):  # ten rows come twice, as from several rasters after a kill
            box = Window(start=(row, column), size=(again, width))
            sink.write(box, array[(slice(None), *box.slices)])
        if column == 0:
            with pytest.raises(InputError, match="never written"):
                sink.close()
    sink.close()
    assert (tmp_path / "strips.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_resume_needs_the_same_key_and_survives_a_torn_journal(tmp_path: Path) -> None:
    def opened(key: str, shape: tuple[int, int] = (8, 5)) -> CogSink:
        return CogSink(tmp_path / "a.tif", grid(shape), LAYER, key=key)

    slab = np.full((1, 4, 5), 3, dtype="uint8")
    opened("k").write(Window(start=(0, 0), size=(4, 5)), slab)
    with (tmp_path / ".a.tif.scratch" / "journal").open("a") as file:
        file.write('["0:5", 8')  # the machine went down inside this line
    again = opened("k")
    assert again.finished(WHOLE) == 4
    for start, array in (((6, 0), slab[:, :2]), ((4, 0), slab[:, :, :3]), ((4, 0), slab[:, :2])):
        with pytest.raises(ShapeError, match="row 4"):
            again.write(Window(start=start, size=(4, 5)), array)
    again.write(Window(start=(4, 0), size=(4, 5)), slab)
    assert opened("k").finished(WHOLE) == 8
    assert opened("k", (8, 6)).finished(Window.whole((8, 6))) == 0
    assert opened("other").finished(WHOLE) == 0


def test_close_before_all_rows_keeps_the_scratch(tmp_path: Path) -> None:
    sink = CogSink(tmp_path / "a.tif", grid((8, 5)), LAYER, key="k")
    sink.write(Window(start=(0, 0), size=(4, 5)), np.zeros((1, 4, 5), dtype="uint8"))
    with pytest.raises(InputError, match="rows from 4 on were never written") as error:
        sink.close()
    assert error.value.code == "output_mismatch"
    assert not (tmp_path / "a.tif").exists()
    assert sink.finished(WHOLE) == 4


def test_layers_that_no_tiff_can_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="own file"):
        Layer(kind="classes", dtype="uint8", bands=("class", "confidence"), colours=COLOURS)
    with pytest.raises(ConfigError, match="known"):
        Layer(kind="classes", dtype="float16", bands=("a",))
    assert disk_needed((1000, 1000), LAYER) >= 1000 * 1000 * 7 / 3


def test_killed_at_every_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.geo.kill_driver", str(tmp_path)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [t["step"] for t in told] == ["scratch", "journal"] * 4 + ["written", "renamed", ""]
    assert {t["sha256"] for t in told} == {told[-1]["sha256"]}
    assert all(t["redone"] <= 1 for t in told)
    assert all(t["left"] == ["a.tif"] for t in told if t["step"] != "renamed")


WRITE = """
import sys, numpy as np
from pathlib import Path
from pipelines.report import peak_memory_mb
from geo.formats.geotiff import CogSink, class_layer
from medmamba.windows import Window
from tests.geo.maker import grid
for n in map(int, sys.argv[2:]):
    sink = CogSink(Path(sys.argv[1]) / f"{n}.tif", grid((n, n)), class_layer({1: "a"}, {1: (9, 9, 9)}), key="k")
    slab = (np.arange(256 * n, dtype=np.uint32) // 37 % 3).astype("uint8").reshape(1, 256, n)
    for row in range(0, n, 256):
        sink.write(Window(start=(row, 0), size=(256, n)), slab)
    sink.close()
    sys.stdout.write(f"{peak_memory_mb()} ")
"""


@pytest.mark.parametrize("sides", [(3072, 5120), pytest.param((5120, 20_480), marks=pytest.mark.slow)])
def test_peak_memory_does_not_know_the_size(tmp_path: Path, sides: tuple[int, int]) -> None:
    """A child process, its high-water mark after a small and after a large scene: within 10 %, below 1 GB."""
    command = [sys.executable, "-c", WRITE, str(tmp_path), *map(str, sides)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    small, large = (float(v) for v in done.stdout.split())
    assert large <= 1.1 * small
    assert large < 1000  # MiB
