"""Rasters in: windows, masks of every kind, scales, refusals."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from geo.align import seen_on
from geo.formats import geotiff, open_scene
from geo.raster import Calibration, RasterSource
from medmamba.errors import GeometryError, InputError
from medmamba.source import read_all
from medmamba.windows import Window
from tests.geo.maker import texture, write_tif


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_values_and_grid(tmp_path: Path, dtype: str) -> None:
    array = (texture((20, 30), 3) * 200).astype(dtype)
    source = RasterSource(write_tif(tmp_path / "a.tif", array, names=("blue", "green", "red")))
    image = read_all(source)
    np.testing.assert_array_equal(image.array, array)
    assert image.array.dtype == source.dtype == np.dtype(dtype)
    assert source.channels == ("blue", "green", "red")
    assert source.grid.frame == "EPSG:32633"
    np.testing.assert_allclose(source.grid.affine[:2, 2], [400_005, 4_999_995])  # centre, not corner
    np.testing.assert_allclose(source.grid.affine[:2, :2], [[0, 10], [-10, 0]])  # a row goes south, a column east


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> RasterSource:
    array = (texture((37, 53), 2) * 200).astype("int16")
    array[:, 5:9, 11:40] = -9999
    options = {"nodata": -9999, "tiled": True, "blockxsize": 16, "blockysize": 16}
    return RasterSource(write_tif(tmp_path_factory.mktemp("masked") / "a.tif", array, **options))


@given(st.data())
def test_a_window_is_a_slice_of_the_whole(masked: RasterSource, data: st.DataObject) -> None:
    whole = read_all(masked)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in masked.grid.shape)
    size = tuple(data.draw(st.integers(1, n - s)) for n, s in zip(masked.grid.shape, start, strict=True))
    window = Window(start=start, size=size)
    image = masked.read(window)
    np.testing.assert_array_equal(image.array, whole.array[(slice(None), *window.slices)])
    np.testing.assert_array_equal(image.valid, whole.valid[window.slices])
    assert image.grid == masked.grid.crop(start, size)


def test_a_window_outside_is_refused(masked: RasterSource) -> None:
    with pytest.raises(GeometryError):
        masked.read(Window(start=(30, 0), size=(10, 10)))


def test_valid_by_tag_mask_alpha_nan(tmp_path: Path) -> None:
    hole = np.zeros((12, 14), dtype=bool)
    hole[3:6, 4:9] = True
    plain = np.full((3, 12, 14), 7, dtype="uint8")
    tagged = np.where(hole, 0, plain).astype("uint8")
    partly = tagged.copy()
    partly[0, 0, 0] = 0  # nodata in one band only: the cell has data
    alpha = np.concatenate([plain, np.where(hole, 0, 255)[None].astype("uint8")])
    floats = np.where(hole, np.nan, 1.5).astype("float32")[None]
    nan_and_tag = floats.copy()
    nan_and_tag[0, 3, 4] = -1
    sources = {
        "tag": RasterSource(write_tif(tmp_path / "tag.tif", partly, nodata=0)),
        "mask": RasterSource(write_tif(tmp_path / "mask.tif", plain, mask=~hole)),
        "alpha": RasterSource(write_tif(tmp_path / "alpha.tif", alpha, photometric="RGB", alpha="YES")),
        "nan": RasterSource(write_tif(tmp_path / "nan.tif", floats)),
        "nan tag": RasterSource(write_tif(tmp_path / "nan_tag.tif", floats, nodata=np.nan)),
        "nan and tag": RasterSource(write_tif(tmp_path / "both.tif", nan_and_tag, nodata=-1)),
    }
    for name, source in sources.items():
        np.testing.assert_array_equal(read_all(source).valid, ~hole, err_msg=name)
    assert len(sources["alpha"].channels) == 3  # alpha is no channel
    assert read_all(RasterSource(write_tif(tmp_path / "none.tif", plain))).valid is None


def test_scale_and_offset(tmp_path: Path) -> None:
    stored = np.arange(24, dtype="int16").reshape(2, 3, 4)
    path = write_tif(tmp_path / "a.tif", stored, scales=(0.5, 2.0), offsets=(1.0, -3.0), nodata=5)
    source = RasterSource(path)
    image = read_all(source)
    np.testing.assert_allclose(image.array, stored * [[[0.5]], [[2.0]]] + [[[1.0]], [[-3.0]]])
    assert (source.units, source.dtype) == ("scaled", np.dtype("float32"))
    assert image.valid.all()  # 5 is nodata in band 1 only
    own = Calibration(scales=(0.1,), offsets=(0.0,), units="reflectance", nodata=5)
    assert RasterSource(path, bands=[2], calibration=own).units == "reflectance"


def test_vrt_and_jp2(tmp_path: Path) -> None:
    array = (texture((40, 50)) * 200).astype("uint8")
    source = write_tif(tmp_path / "a.tif", array)
    vrt = tmp_path / "a.vrt"
    vrt.write_text(
        '<VRTDataset rasterXSize="20" rasterYSize="10"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{source.name}</SourceFilename><SourceBand>1</SourceBand>'
        '<SrcRect xOff="5" yOff="7" xSize="20" ySize="10"/><DstRect xOff="0" yOff="0" xSize="20" ySize="10"/>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    np.testing.assert_array_equal(read_all(open_scene(vrt)).array, array[:, 7:17, 5:25])
    jp2 = write_tif(tmp_path / "a.jp2", array, driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    np.testing.assert_array_equal(read_all(open_scene(jp2)).array, array)
    assert [p.name for p in geotiff.find(tmp_path)] == ["a.jp2", "a.tif", "a.vrt"]


def test_pictures_say_that_they_lie_nowhere(tmp_path: Path) -> None:
    array = (texture((9, 8), 3) * 200).astype("uint8")
    Picture.fromarray(np.moveaxis(array, 0, -1)).save(tmp_path / "a.png")
    source = open_scene(tmp_path / "a.png")
    np.testing.assert_array_equal(read_all(source).array, array)
    assert source.grid.frame == "pixels"
    assert "no georeference" in source.notes[0]


def test_refusals_have_codes(tmp_path: Path) -> None:
    def code(path: Path) -> str:
        with pytest.raises(InputError, match=path.name) as error:
            read_all(open_scene(path))
        return error.value.code

    good = write_tif(tmp_path / "good.tif", (texture((64, 64)) * 200).astype("uint8"), compress="deflate")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("not a raster")
    (tmp_path / "cut.tif").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    Picture.new("RGB", (60, 60)).save(tmp_path / "whole.png")
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[60] ^= 255
    (tmp_path / "damaged.png").write_bytes(damaged)
    write_tif(tmp_path / "complex.tif", np.zeros((1, 3, 3), dtype="complex64"))
    (tmp_path / "notes.txt").write_text("?")
    expected = {
        **{"missing.tif": "missing_file", "empty.tif": "corrupt_file", "text.tif": "unsupported_format"},
        **{"cut.tif": "corrupt_file", "damaged.png": "corrupt_file", "complex.tif": "unsupported_format"},
        "notes.txt": "unsupported_format",
    }
    assert {name: code(tmp_path / name) for name in expected} == expected


def test_two_readers_of_one_file_at_a_time(tmp_path: Path) -> None:
    """GDAL's handle is not safe in two threads; the raster and what is warped from it share one lock."""
    array = (texture((300, 300)) * 200).astype("uint8")
    source = RasterSource(write_tif(tmp_path / "a.tif", array, tiled=True, blockxsize=16, blockysize=16))
    shifted = seen_on(source, source.grid, shift_px=(0.5, 0.5))
    truth = read_all(shifted).array
    windows = [Window(start=(r, c), size=(50, 50)) for r in range(0, 300, 50) for c in range(0, 300, 50)]
    fresh = seen_on(source, source.grid, shift_px=(0.5, 0.5))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda w: (source.read(w).array, fresh.read(w).array), windows * 4))
    for window, (plain, warped) in zip(windows * 4, found, strict=True):
        np.testing.assert_array_equal(plain, array[(slice(None), *window.slices)])
        np.testing.assert_array_equal(warped, truth[(slice(None), *window.slices)])
