"""Another grid: the window read is the whole read, exactly; which grid, what ground, which pairs are refused."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from geo.align import align, seen_on
from geo.crs import grid_of
from geo.raster import Calibration, RasterSource, raster_env
from geo.warp import RESAMPLING, AlignedSource, CroppedSource
from medmamba.errors import ConfigError, InputError
from medmamba.grid import Grid
from medmamba.source import StackedSource, read_all
from medmamba.windows import Window
from tests.geo.maker import texture, transform, write_tif

TARGETS = {  # another CRS; coarser and turned; finer and offset by a fraction
    "geographic": Grid((290, 610), [[0, 1.1e-4, 13.7250], [-8e-5, 0, 45.1465], [0, 0, 1]], "EPSG:4326"),
    "coarse": Grid((150, 300), [[3.0, 24, 400_101], [-24, 2, 4_999_777], [0, 0, 1]], "EPSG:32633"),
    "fine": Grid((400, 700), [[0, 6.3, 399_953.7], [-6.3, 0, 5_000_041.3], [0, 0, 1]], "EPSG:32633"),
}


@pytest.fixture(scope="module")
def rasters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("align")
    ground = texture((400, 620), 2, smooth=1.0)
    whole = np.clip(ground * 255, 1, 255).astype("uint8")
    whole[:, 100:140, 50:90] = 0
    floats = ground.astype("float32")
    floats[:, 30:33, 200:260] = np.nan
    return {
        "uint8": write_tif(folder / "u.tif", whole, nodata=0),
        "float32": write_tif(folder / "f.tif", floats),
        "scaled": write_tif(
            folder / "s.tif", (ground * 5000).astype("int16"), scales=(1e-4, 1e-4), offsets=(0.1, 0.2), nodata=-1
        ),
    }


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["uint8", "float32", "scaled"])
def test_windows_are_the_whole(rasters: dict[str, Path], kind: str, target: str, resampling: str) -> None:
    grid = TARGETS[target]
    source = RasterSource(rasters[kind])
    whole = read_all(AlignedSource(source, grid, resampling=resampling))
    assert 0.2 < whole.valid.mean() < 1
    again = AlignedSource(source, grid, resampling=resampling)
    draw = np.random.default_rng(7)
    for _ in range(12):
        start = tuple(int(draw.integers(0, n)) for n in grid.shape)
        size = tuple(int(draw.integers(1, n - s + 1)) for n, s in zip(grid.shape, start, strict=True))
        window = Window(start=start, size=size)
        image = again.read(window)
        np.testing.assert_array_equal(image.valid, whole.valid[window.slices])
        np.testing.assert_array_equal(image.array, whole.array[(slice(None), *window.slices)])  # NaN equals NaN here


@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("target", TARGETS)
def test_the_lattice_of_chunks_cannot_be_seen(rasters: dict[str, Path], target: str, resampling: str) -> None:
    """One request of GDAL for the whole raster gives the same numbers as chunk by chunk (0 values differ)."""
    aligned = AlignedSource(RasterSource(rasters["uint8"]), TARGETS[target], resampling=resampling)
    with raster_env():
        whole = aligned._warped.read([1, 2])
    np.testing.assert_array_equal(read_all(aligned).array, whole)


def test_default_warped_reads_do_depend_on_the_tile(tmp_path: Path) -> None:
    """The trap itself: with GDAL's defaults, which peers use, tiles differ from the whole: these tests can fail."""
    ground = np.clip(texture((718, 791), smooth=0.7) * 255, 0, 255).astype("uint8")
    path = write_tif(tmp_path / "a.tif", ground, transform=transform(300, 101_985, 2_826_915), crs="EPSG:32618")

    def read(*windows: tuple[tuple[int, int], tuple[int, int]]) -> list[np.ndarray]:
        with rasterio.open(path) as data, WarpedVRT(data, crs="EPSG:4326", resampling=Resampling.bilinear) as warped:
            return [warped.read(1, window=w) for w in windows]

    cuts = [(r, r + 100) for r in range(0, 600, 100)]
    (whole,) = read(((0, 600), (0, 700)))
    tiled = np.concatenate(read(*[(rows, (0, 700)) for rows in cuts]))
    columns = np.concatenate(read(*[((0, 600), (c, c + 70)) for c in range(0, 700, 70)]), axis=1)
    assert (tiled != whole).any() or (columns != whole).any()


def test_values_lie_where_they_should(tmp_path: Path) -> None:
    """A plane, value = x + y of the world: bilinear resampling must give the coordinates of its own centres."""
    rows, cols = np.mgrid[0:60, 0:80]
    ramp = (400_005 + 10 * cols - 4e5 + 5e6 - 5 - 10 * rows - 4.9e6).astype("float64")[None]
    source = RasterSource(write_tif(tmp_path / "a.tif", ramp))
    grid = Grid((50, 60), [[0.0, 7, 400_104.3], [-7, 0, 4_999_890.9], [0, 0, 1]], "EPSG:32633")
    image = read_all(seen_on(source, grid))
    r, c = np.mgrid[0:50, 0:60]
    np.testing.assert_allclose(image.array[0], (104.3 + 7 * c) + (99_890.9 - 7 * r), atol=1e-3)
    moved = read_all(seen_on(source, source.grid.crop((10, 10), (30, 40)), shift_px=(1.5, -2.25)))
    np.testing.assert_allclose(moved.array[0], ramp[0, 10:40, 10:50] - 15 - 22.5, atol=1e-3)


def test_nodata_never_bleeds(tmp_path: Path) -> None:
    array = np.full((1, 40, 40), 100, dtype="uint8")
    array[:, 10:20, 10:20] = 0
    source = RasterSource(write_tif(tmp_path / "a.tif", array, nodata=0))
    untagged = RasterSource(
        write_tif(tmp_path / "b.tif", array),
        calibration=Calibration(scales=(1.0,), offsets=(0.0,), units="DN uint8", nodata=0),
    )
    grid = Grid((60, 60), [[0.0, 6.1, 400_002], [-6.1, 0, 4_999_998], [0, 0, 1]], "EPSG:32633")
    for one in (source, untagged):
        for resampling in RESAMPLING:
            image = read_all(seen_on(one, grid, resampling=resampling))
            assert set(np.unique(image.array[0][image.valid])) == {100}
            assert (~image.valid).sum() == pytest.approx(100 * 100 / 6.1**2, rel=0.2)


@settings(max_examples=25)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 30), st.integers(1, 30))
def test_equal_lattices_are_cropped_not_resampled(
    tmp_path_factory: pytest.TempPathFactory, row: int, col: int, rows: int, cols: int
) -> None:
    array = (texture((50, 50)) * 255).astype("uint8")
    source = RasterSource(write_tif(tmp_path_factory.mktemp("c") / "a.tif", array))
    seen = seen_on(source, source.grid.crop((row, col), (rows, cols)))
    assert isinstance(seen, CroppedSource)
    np.testing.assert_array_equal(read_all(seen).array, array[:, row : row + rows, col : col + cols])


def test_dates_come_onto_one_grid(tmp_path: Path) -> None:
    ground = (texture((100, 120)) * 250).astype("uint8")
    before = RasterSource(write_tif(tmp_path / "a.tif", ground))
    half = RasterSource(write_tif(tmp_path / "b.tif", ground, transform=transform(10, 400_202.0, 4_999_902.0)))
    fine = RasterSource(write_tif(tmp_path / "c.tif", ground, transform=transform(5, 400_000.0, 5_000_000.0)))
    found = align([before, half])
    assert found.grid.shape == (90, 100)  # the ground both show: 10 rows and 20 columns of the first are cut
    assert found.grid == before.grid.crop((10, 20), (90, 100))
    assert found.record["reference"] == "first"
    assert found.record["warps"][1]["tolerance"] == 1e-6
    assert align([before, fine], reference="finest").grid.spacing == (5, 5)
    assert align([before, fine], reference="coarsest").grid.spacing == (10, 10)
    assert align([before, half, fine]).grid.shape == (40, 40)
    StackedSource(*found.sources)
    again = seen_on(found.sources[1], half.grid)
    assert again is half  # what was aligned is resampled from its own file, never twice
    with pytest.raises(ConfigError, match="known"):
        align([before, half], reference="best")


def test_pairs_that_cannot_be_compared(tmp_path: Path) -> None:
    ground = (texture((30, 30), 3) * 250).astype("uint8")
    one = RasterSource(write_tif(tmp_path / "a.tif", ground))
    others = {
        "no_overlap": write_tif(tmp_path / "far.tif", ground, transform=transform(10, 500_000.0)),
        "wrong_channels": write_tif(tmp_path / "one.tif", ground[:1]),
        "wrong_units": write_tif(tmp_path / "u16.tif", ground.astype("uint16")),
    }
    for code, path in others.items():
        with pytest.raises(InputError) as error:
            align([one, RasterSource(path)])
        assert error.value.code == code
    nowhere = [RasterSource(write_tif(tmp_path / f"{n}.png", ground[:, :n], driver="PNG", crs=None, transform=None))
               for n in (20, 30)]  # fmt: skip
    for pair in ([one, nowhere[1]], nowhere):
        with pytest.raises(InputError) as error:
            align(pair)
        assert error.value.code == "grid_mismatch"
    assert align([nowhere[1], nowhere[1]]).sources[1] is nowhere[1]


def test_another_body_is_no_common_ground(tmp_path: Path) -> None:
    ground = (texture((30, 30)) * 250).astype("uint8")
    mars = CRS.from_proj4("+proj=eqc +R=3396190 +no_defs")
    one = RasterSource(write_tif(tmp_path / "a.tif", ground))
    other = RasterSource(write_tif(tmp_path / "b.tif", ground, crs=mars, transform=transform(10, 0, 0)))
    with pytest.raises(InputError) as error:
        align([one, other])
    assert error.value.code == "no_overlap"
    assert grid_of(transform(), (3, 3), mars).frame.startswith("PROJCRS")
