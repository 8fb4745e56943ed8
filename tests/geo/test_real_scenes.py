"""Real rasters: all that can be read reads the same by window, what cannot has its code, and mismatched pairs of a real
scene give the whole product set. Skipped where the folder of real files is absent."""

from datetime import UTC, datetime
from pathlib import Path

import geopandas
import numpy as np
import pytest
from rio_cogeo import cog_validate

from geo.align import align, seen_on
from geo.coregister import coregister
from geo.crs import CellArea, crs_of, transform_of
from geo.formats import geotiff, open_scene
from geo.formats.geotiff import CogSink, class_layer, confidence_layer
from geo.preview import class_picture, picture, write_png
from geo.quality import MaskingSink, QualitySource, observability
from geo.radiometry import common_stretch, invariant_fit
from geo.raster import RasterSource
from geo.stac import Lineage, ProductFile, product_item, write_item
from geo.transitions import FromToSource, class_areas, transitions
from geo.vector import polygons
from geo.vector_files import Told, write_polygons
from medmamba.errors import InputError
from medmamba.grid import Grid
from medmamba.preprocessing import slabs
from medmamba.source import read_all
from medmamba.windows import Window
from tests.geo.maker import write_tif

BROKEN = {
    **dict.fromkeys([f"pil_crash_0{n}.tif" for n in (0, 2, 4, 6)], "corrupt_file"),
    **dict.fromkeys([f"fuzz_{n}.tif" for n in ("divide_by_zero_0", "inf_loop_0", "inf_loop_2")], "corrupt_file"),
    **dict.fromkeys([f"fuzz_{n}.tif" for n in ("oom_crash_0", "oom_crash_2", "oor_panic_0")], "corrupt_file"),
    **{
        "rio_corrupt.tif": "corrupt_file",
        "pil_zero_height.j2k": "corrupt_file",
        "rio_no_band.h5": "unsupported_format",
    },
    "pil_broken_data_stream.png": "corrupt_file",
}
READABLE = ("pil_total-pages-zero.tif", "pil_tiff_wrong_bits_per_sample.tiff", "pil_invalid_header_length.jp2")


def test_every_raster_reads_by_window_or_has_a_code(shared: Path) -> None:
    draw = np.random.default_rng(0)
    refused = {}
    for path in geotiff.find(shared / "data" / "satellite"):
        try:
            source = open_scene(path)
        except InputError as error:
            refused[path.name] = error.code
            continue
        whole = read_all(source)
        for _ in range(3):
            start = tuple(int(draw.integers(0, n)) for n in source.grid.shape)
            size = tuple(int(draw.integers(1, n - s + 1)) for n, s in zip(source.grid.shape, start, strict=True))
            window = Window(start=start, size=size)
            image = source.read(window)
            np.testing.assert_array_equal(image.array, whole.array[(slice(None), *window.slices)], err_msg=path.name)
            if whole.valid is not None:
                np.testing.assert_array_equal(image.valid, whole.valid[window.slices], err_msg=path.name)
        assert source.notes or source.grid.frame != "pixels", path.name
        source.close()
    assert refused == {"rc_slc.tif": "unsupported_format"}  # complex radar


def test_broken_rasters_have_codes(shared: Path) -> None:
    found = {}
    for name in (*BROKEN, *READABLE):
        try:
            read_all(open_scene(shared / "data" / "broken" / name))
        except InputError as error:
            found[name] = error.code
            found[name] += "" if name in str(error) else " (unnamed)"
    assert found == BROKEN


def test_masks_of_real_files(shared: Path) -> None:
    """Equal ground, mask by nodata tag and by sidecar; a file whose nodata tag is missing and one that has it."""
    folder = shared / "data" / "satellite"
    tag, sidecar = (read_all(open_scene(folder / f"rio_RGB{n}.byte.tif")) for n in ("", "2"))
    assert (tag.valid != sidecar.valid).mean() < 0.01
    assert read_all(open_scene(folder / "rc_image_missing_nodata.tif")).valid is None
    assert read_all(open_scene(folder / "rc_image_nodata.tif")).valid.mean() == pytest.approx(0.705, abs=1e-3)
    nan_and_zero = read_all(open_scene(folder / "rt_cog_nodata_nan.tif"))
    assert not np.isfinite(nan_and_zero.array[0][~nan_and_zero.valid]).all()
    assert np.isfinite(nan_and_zero.array[0][nan_and_zero.valid]).all()


def test_land_cover_of_thirty_years(shared: Path) -> None:
    """The changed share told with the files: 45,857 of 552,023 filled cells (bands 1 and 31), 1 ha each."""
    path = shared / "data" / "landcover_series" / "above_landcover_31years.tif"
    first, last = (RasterSource(path, bands=[b]) for b in (1, 31))
    area = CellArea(first.grid)
    found = transitions(first, last, area, {c: f"class {c}" for c in range(1, 11)})
    told = found.to_json()
    filled = read_all(RasterSource(path)).array.max(axis=0) < 255
    changed = (read_all(first).array[0] != read_all(last).array[0]) & filled
    assert changed.sum() == 45_857
    assert told["changed"] == pytest.approx(45_857, rel=2e-4)  # a few cells are filled in these two years only
    codes = FromToSource(first, last)
    wanted = frozenset(a * 256 + b for a in range(1, 11) for b in range(1, 11) if a != b)
    shapes = polygons(codes, area, wanted, slab_rows=600)
    assert sum(p.counts for p in shapes.kept) == found.counts.sum() - np.trace(found.counts)


def mismatched(shared: Path, folder: Path, kind: str) -> tuple[RasterSource, RasterSource]:
    """A real scene and the same scene, with a known rectangle painted over, on another grid."""
    before = RasterSource(shared / "data" / "satellite" / "rio_RGB.byte.tif")
    image = read_all(before)
    painted = image.array.copy()
    painted[:, 300:380, 350:460] = np.array([250, 20, 20])[:, None, None]
    after = RasterSource(write_tif(folder / "painted.tif", painted, nodata=0, crs=before.dataset.crs,
                                   transform=before.dataset.transform))  # fmt: skip
    affine = before.grid.affine
    grids = {
        "crs": Grid((720, 860), np.array([[0, 0.0032, -78.96], [-0.0026, 0, 25.55], [0, 0, 1]]), "EPSG:4326"),
        "offset": before.grid.crop((0, 0), (700, 780)),
        "resolution": before.grid.zoom((431, 475)),
    }
    target = grids[kind]
    if kind == "offset":
        target = Grid(target.shape, affine + np.array([[0, 0, 150.0], [0, 0, -150.0], [0, 0, 0]]), target.frame)
    seen = read_all(seen_on(after, target))
    values = np.where(seen.valid, seen.array, 0).astype("uint8")
    path = write_tif(folder / f"{kind}.tif", values, nodata=0, crs=crs_of(target.frame), transform=transform_of(target))
    return before, RasterSource(path)


@pytest.mark.parametrize("kind", ["crs", "offset", "resolution"])
def test_a_mismatched_pair_gives_the_whole_product_set(shared: Path, tmp_path: Path, kind: str) -> None:
    found = align(mismatched(shared, tmp_path, kind))
    before, after = found.sources
    after, registration = coregister(before, after)
    assert np.hypot(*registration.left_px) < 0.15
    fit = invariant_fit(before, after)
    assert all(b.used and abs(b.gain - 1) < 0.1 for b in fit.bands)
    qualities = [QualitySource(before), QualitySource(after)]
    area = CellArea(found.grid)
    names, colours = {0: "no change", 1: "painted"}, {1: (255, 0, 0)}
    sinks = [
        MaskingSink(CogSink(tmp_path / "change.tif", found.grid, class_layer(names, colours), key="k"), qualities),
        MaskingSink(CogSink(tmp_path / "sure.tif", found.grid, confidence_layer(), key="k"), qualities, hidden=255),
    ]
    for window in slabs(found.grid.shape):  # stands for the network: far apart in red means change
        one, two = (s.read(window).array.astype(float) for s in (before, after))
        far = two[0] - two[1] > 150
        sinks[0].write(window, far[None].astype("uint8"))
        sinks[1].write(window, np.where(far, 90, 60)[None].astype("uint8") + 0 * one[:1].astype("uint8"))
    for sink in sinks:
        sink.close()
    for name in ("change.tif", "sure.tif"):
        assert cog_validate(tmp_path / name, strict=True) == (True, [], [])
    change, sure = RasterSource(tmp_path / "change.tif"), RasterSource(tmp_path / "sure.tif")
    shapes = polygons(change, area, frozenset({1}), confidence=sure, least_area=5e6, slab_rows=61)
    told = Told(legend={1: ("any", "painted")}, date_from="", date_to="", model="rule")
    package, parquet = write_polygons(tmp_path / "change", shapes, told)
    (row,) = geopandas.read_parquet(parquet).to_dict("records")
    assert row["area_m2"] == pytest.approx(80 * 110 * 300.038 * 300.042, rel=0.03)
    assert row["confidence_mean"] == pytest.approx(0.9)
    hectares = class_areas(change, area, names)
    assert hectares["painted"] == pytest.approx(row["area_m2"] / 1e4, rel=0.01)
    seen = observability(qualities, area)
    assert seen["observed"] == pytest.approx(hectares["painted"] + hectares["no change"])
    assert seen["nodata"] > 0
    stretch = common_stretch([before, after])
    write_png(tmp_path / "quick.png", picture(after, stretch, (0, 1, 2), longest=200))
    assert (class_picture(change, colours, longest=200)[..., 3] > 0).any()
    lineage = Lineage(inputs=("a",), sentence="s", software={"medmamba": "0"}, model={}, created=datetime.now(UTC))
    files = [ProductFile(path=p, title=p.name) for p in (tmp_path / "change.tif", package, parquet)]
    item = product_item(kind, found.grid, files, lineage)
    write_item(tmp_path / "item.json", item)
    assert -80 < item.bbox[0] < item.bbox[2] < -75
