"""Two scenes to products: other grids, clouds of missing cells, pictures, broken files, a kill inside a scene."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from PIL import Image as Picture
from pyproj import Transformer
from rasterio.warp import Resampling, reproject
from rio_cogeo import cog_validate
from typer.testing import CliRunner

from flows import batch
from flows.batch import ASIDE, WELL, run_batch
from flows.cli import app
from flows.work import run_in_order
from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from pipelines.domains import domain_of
from pipelines.layouts.change import read_layout
from pipelines.networks import NETWORKS
from pipelines.report import Report
from pipelines.scoring.change_files import evaluate_maps
from pipelines.serving.forecast import forecast
from pipelines.serving.predict import Predictor
from tests.geo.maker import transform, write_tif
from tests.geo.test_stac import offline
from tests.ways.tiny_pair import (
    CLASSES,
    DIFFERENCE,
    Difference,
    changed,
    ground,
    make_bundle,
    truth,
    write_pair,
    write_safe,
)

CHECKOUT = Path(__file__).resolve().parents[2]
CELL_HA = 0.01  # 10 m x 10 m in the plane
SCALE = 1.0006  # of UTM off its central meridian here: true areas are that much larger or smaller


@pytest.fixture(autouse=True)
def difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, DIFFERENCE, Difference)


def run(bundle: Bundle, files: list[Path], output: Path) -> Report:
    domain = domain_of(bundle.task)
    (case,) = domain.cases_of(files, bundle.preprocessing.roles, output=output)
    return domain.predict(Predictor.load(bundle, device="cpu"), case, output, None)


def codes(path: Path) -> np.ndarray:
    with rasterio.open(path) as data:
        values: np.ndarray = data.read(1)
    return values


def test_a_pair_leaves_every_product_and_they_agree(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", threshold=0.5)
    report = run(bundle, list(write_pair(tmp_path)), tmp_path / "out")
    folder = tmp_path / "out" / bundle.title
    assert set(report.outputs) | {"a_change.json"} == {p.name for p in folder.iterdir()}  # nothing else is left
    assert np.array_equal(codes(folder / "a_change.tif"), truth())
    for name in ("change", "confidence"):
        valid, errors, warnings = cog_validate(folder / f"a_{name}.tif")
        assert valid
        assert (errors, warnings) == ([], [])
    with rasterio.open(folder / "a_change.tif") as data:
        assert (data.nodata, data.crs.to_epsg(), data.transform) == (255, 32633, transform())
        assert data.colormap(1)[1][:3] != data.colormap(1)[0][:3]
        assert data.tags()["class_1"] == "changed"
    rows = geopandas.read_file(folder / "a_polygons.gpkg")
    assert (len(rows), rows.cells.sum()) == (2, truth().sum())
    again = geopandas.read_parquet(folder / "a_polygons.parquet")
    assert list(rows["id"]) == list(again["id"])
    assert rows.geometry.to_wkt().equals(again.geometry.to_wkt())
    areas = json.loads((folder / "a_areas.json").read_text())
    assert areas["unit"] == "ha"
    assert areas["areas"]["changed"] == pytest.approx(rows.area_m2.sum() / 1e4, rel=1e-12)
    assert areas["areas"]["changed"] == pytest.approx(truth().sum() * CELL_HA, rel=2 * (SCALE - 1))
    assert report.numbers["areas"] == areas["areas"]
    assert rows.confidence_min.min() > 0.5
    item = pystac.Item.from_file(folder / "a_stac.json")
    item.validate(validator=offline())
    assert {Path(link.href).name for link in item.get_links("derived_from")} == {"a.tif"}
    assert item.properties["medmamba:model"]["bundle"] == bundle.id
    page = (folder / "a_page.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "Content-Security-Policy" in page


def test_semantic_change_tells_from_what_to_what(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", task="semantic_change")
    report = run(bundle, list(write_pair(tmp_path)), tmp_path / "out")
    folder = tmp_path / "out" / bundle.title
    change, earlier, later = (codes(folder / f"a_{name}.tif") for name in ("change", "from", "to"))
    assert np.array_equal(change, truth())
    for classes in (earlier, later):
        assert np.array_equal(classes > 0, truth())  # 0 exactly where unchanged
    assert (later[truth()] >= earlier[truth()]).all()  # blocks became brighter
    assert (later > earlier).any()
    matrix = np.array(report.numbers["transitions"]["from_to"])
    assert report.numbers["transitions"]["names"] == list(CLASSES)
    assert matrix[1:, 1:].sum() == pytest.approx(report.numbers["areas"]["changed"], rel=1e-9)
    rows = geopandas.read_parquet(folder / "a_polygons.parquet")
    moved = matrix[1:, 1:].sum() - np.trace(matrix[1:, 1:])
    assert rows.area_m2.sum() / 1e4 == pytest.approx(moved, rel=1e-9)
    assert (rows["from"] != rows["to"]).all()


def test_the_window_changes_no_product(tmp_path: Path) -> None:
    pair = list(write_pair(tmp_path))
    folders = []
    for window in (32, 48):
        bundle = make_bundle(tmp_path / f"bundle{window}", window=window)
        run(bundle, pair, tmp_path / "out")
        folders.append(tmp_path / "out" / bundle.title)
    one, other = ([codes(f / f"a_{n}.tif") for n in ("change", "confidence")] for f in folders)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    shapes = [geopandas.read_parquet(f / "a_polygons.parquet") for f in folders]
    assert shapes[0].drop(columns="model").equals(shapes[1].drop(columns="model"))


def test_other_crs_offset_grid_missing_cells_and_season(tmp_path: Path) -> None:
    before, after = ground(), changed(ground())
    before[:, :8, :] = 0  # no data at the top
    darker = np.clip(np.rint(after * 0.8 + 10), 1, 255).astype(np.uint8)
    x, y = Transformer.from_crs("EPSG:32633", "EPSG:3857", always_xy=True).transform(400_000.0, 5_000_000.0)
    there = Affine(13.3, 0, x + 37.0, 0, -13.3, y - 21.0)  # another origin, and other cells in the plane of the web
    warped = np.zeros((3, 104, 126), np.uint8)
    reproject(
        darker, warped, src_transform=transform(), src_crs="EPSG:32633", dst_transform=there, dst_crs="EPSG:3857",
        resampling=Resampling.cubic, dst_nodata=0,
    )  # fmt: skip
    files = [
        write_tif(tmp_path / "one.tif", before, nodata=0),
        write_tif(tmp_path / "two.tif", warped, crs="EPSG:3857", transform=there, nodata=0),
    ]
    bundle = make_bundle(tmp_path / "bundle")
    report = run(bundle, files, tmp_path / "out")
    found = codes(tmp_path / "out" / bundle.title / "one-two_change.tif")
    shape = found.shape
    assert min(shape) > 80  # the common ground
    (_, _, x), (_, _, y), _ = report.grid["affine"]
    start = [round((4_999_995.0 - y) / 10), round((x - 400_005.0) / 10)]  # where the common ground begins
    assert (found[: 8 - start[0]] == 255).all()
    assert report.numbers["observability"]["nodata"] > 0
    real = truth()[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]
    seen = found < 254
    overlap = ((found == 1) & real & seen).sum() / (((found == 1) | real) & seen).sum()
    assert overlap > 0.8  # resampled twice: only the rims of the blocks may differ
    gains = [band["gain"] for band in report.numbers["normalisation"]["bands"]]
    assert gains == pytest.approx([1 / 0.8] * 3, rel=0.1)
    assert report.numbers["alignment"]["warps"][1]["resampling"] == "bilinear"


def test_two_sentinel_products_of_two_baselines_with_clouds(tmp_path: Path) -> None:
    """Whole folders in: the offset of the newer baseline is no change, clouds are not observed, told in hectares."""
    earlier, later = (np.concatenate([s, s[:1]]).astype(np.uint16) * 15 for s in (ground(), changed(ground())))
    clear = np.full((48, 60), 4, np.uint8)
    cloudy, lost = clear.copy(), clear.copy()
    cloudy[:10, 30:], lost[40:, :10] = 9, 0  # cloud over 20 x 60 cells, no data in 16 x 20
    made = (
        ("S2A_one.SAFE", earlier, cloudy, "2020-06-01", "03.01"),
        ("S2B_two.SAFE", later, lost, "2024-06-01", "05.09"),
    )
    files = [write_safe(tmp_path / n, dn, scl, date=date, baseline=base) for n, dn, scl, date, base in made]
    bundle = make_bundle(tmp_path / "bundle", bands=4, shift=0.19, scale=0.1)
    report = run(bundle, files, tmp_path / "out")
    folder = tmp_path / "out" / bundle.title
    found = codes(folder / "S2A_one-S2B_two_change.tif")
    expected = truth().astype(np.uint8)
    expected[:20, 60:], expected[80:, :20] = 254, 255
    assert np.array_equal(found, expected)
    told = report.numbers["observability"]
    assert told["not_observable"] == pytest.approx(20 * 60 * CELL_HA, rel=2 * (SCALE - 1))
    assert told["nodata"] == pytest.approx(16 * 20 * CELL_HA, rel=2 * (SCALE - 1))
    assert report.numbers["areas"]["not observed"] == pytest.approx(told["not_observable"] + told["nodata"], rel=1e-9)
    assert report.numbers["clouds"] == {"before": "SCL", "after": "SCL"}
    assert {b["used"] for b in report.numbers["normalisation"]["bands"]} == {True}
    assert any("baseline 05.09" in warning for warning in report.warnings)
    item = json.loads((folder / "S2A_one-S2B_two_stac.json").read_text())
    assert item["properties"]["start_datetime"].startswith("2020-06-01T10:00:00")
    rows = geopandas.read_parquet(folder / "S2A_one-S2B_two_polygons.parquet")
    assert rows.cells.sum() == (expected == 1).sum()


def test_pictures_without_georeference_work_and_say_so(tmp_path: Path) -> None:
    files = []
    for name, scene in (("x.png", ground()), ("y.png", changed(ground()))):
        Picture.fromarray(np.moveaxis(scene, 0, -1)).save(tmp_path / name)
        files.append(tmp_path / name)
    report = run(make_bundle(tmp_path / "bundle"), files, tmp_path / "out")
    assert (report.numbers["unit"], report.numbers["areas"]["changed"]) == ("cells", truth().sum())
    assert any("no georeference" in warning for warning in report.warnings)
    small = tmp_path / "small.png"
    Picture.fromarray(np.moveaxis(ground()[:, :50], 0, -1)).save(small)
    with pytest.raises(InputError) as error:
        run(make_bundle(tmp_path / "bundle"), [files[0], small], tmp_path / "out")
    assert error.value.code == "grid_mismatch"


def test_a_batch_sets_unfit_pairs_aside_and_a_rerun_finds_nothing_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)
    bundle = make_bundle(tmp_path / "bundle")
    before, after = write_pair(tmp_path)
    far = write_tif(tmp_path / "far.tif", ground(1), transform=transform(x=900_000.0))
    one = write_tif(tmp_path / "one.tif", ground()[:1])
    wide = write_tif(tmp_path / "wide.tif", ground().astype(np.uint16))
    cut = tmp_path / "cut.tif"
    cut.write_bytes(after.read_bytes()[:200])
    other = write_tif(tmp_path / "other.tif", ground(7))
    rows = {"good": after, "far": far, "one": one, "wide": wide, "cut": cut, "other": other}
    lines = [f"{name},{before},{path},2020-06-01,2024-06-01" for name, path in rows.items()]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,before,after,date_before,date_after", *lines]))
    said: list[str] = []

    def go(**more: Any) -> int:
        asked = {"input": tmp_path / "pairs.csv", "bundle": str(bundle.folder), "output": tmp_path / "out", **more}
        return run_batch(echo=said.append, runner=run_in_order, settle=0, **asked)

    assert go() == ASIDE
    folder = tmp_path / "out" / bundle.title
    aside = {p.stem: json.loads(p.read_text())["code"] for p in folder.glob("set_aside/*.json")}
    expected = {"far": "no_overlap", "one": "wrong_channels", "wide": "wrong_units", "cut": "corrupt_file"}
    expected["other"] = "misregistered"  # another place: its blocks are shifted any way
    assert aside == expected
    item = json.loads((folder / "good_stac.json").read_text())
    assert item["properties"]["start_datetime"].startswith("2020-06-01")
    assert set(geopandas.read_parquet(folder / "good_polygons.parquet").date_to) == {"2024-06-01"}
    assert "other" in (folder / "report.html").read_text()
    assert not (folder / "dataset_description.json").exists()  # BIDS is for the volumes of medicine
    said.clear()
    assert go() == ASIDE
    assert "nothing due" in said[0]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,before,after,date_before,date_after", *lines[:1]]))
    assert go() == WELL
    after.with_suffix(".tif.msk").write_bytes(b"")  # a sidecar belongs to the scene
    said.clear()
    go()
    assert "1 due" in said[0]


def test_killed_inside_a_scene_it_goes_on_behind_its_last_rows(tmp_path: Path) -> None:
    kills = [17, 34]  # of 5 rows of 7 windows: in the third and in the last row
    arguments = [sys.executable, "-m", "tests.ways.kill_pair_driver", str(tmp_path), "0", *map(str, kills)]
    done = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *broken = json.loads(done.stdout)
    assert (whole["signal"], whole["windows"]) == (0, 35)
    (folder,) = (tmp_path / "out0").glob("pairs-*")
    names = [p.name for p in folder.iterdir() if p.suffix in (".tif", ".gpkg", ".parquet", ".csv", ".png")]
    assert len(names) == 6
    for kill in broken:
        assert (kill["signal"], kill["again"]) == (signal.SIGKILL, 0)
        assert not [name for name in kill["left"] if not name.startswith(".")]  # no half product under a final name
        finished = (kill["n"] - 1) // 7  # rows of windows; those that reach into the next one are computed again
        assert kill["windows"] <= 35 - 7 * max(finished - 1, 0), kill
        for name in names:
            again = tmp_path / f"out{kill['n']}" / folder.name / name
            assert again.read_bytes() == (folder / name).read_bytes(), (kill, name)


def test_more_dates_are_compared_one_with_the_next(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    scenes = {"y2020": ground(), "y2022": changed(ground()), "y2024": changed(ground())}
    files = [write_tif(tmp_path / f"{name}.tif", scene) for name, scene in scenes.items()]
    arguments = ["predict", *map(str, files), "--bundle", str(bundle.folder), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    folder = tmp_path / "out" / bundle.title
    found = [int((codes(folder / f"{name}_change.tif") == 1).sum()) for name in ("y2020-y2022", "y2022-y2024")]
    assert found == [truth().sum(), 0]
    with pytest.raises(ConfigError, match="a-b would have the same name"):
        domain_of(bundle.task).cases_of([Path("a"), Path("b"), Path("x/a"), Path("x/b")], (), output=tmp_path / "out")


def test_real_scenes_of_other_grids_and_broken_rasters(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)
    scenes, broken = shared / "data/satellite", shared / "data/broken"
    bundle = make_bundle(tmp_path / "bundle", comparison={"register": "none"})
    crops = {"earlier": (300, 350, 0), "later": (290, 340, 90)}  # first row and column, brighter by
    with rasterio.open(scenes / "rio_RGB.byte.tif") as data:
        for name, (row, col, brighter) in crops.items():
            window = rasterio.windows.Window(col, row, 150, 140)
            array = data.read(window=window)
            block = array[:, 60:90, 70:110].astype(int)
            array[:, 60:90, 70:110] = np.minimum(block + brighter, 255)
            seen = (array[:, 60:90, 70:110] - block).mean(0) >= 32  # bright cells saturate; 0.5 x 64 DN
            cells = int((seen & (block.max(0) > 0)).sum())  # 0 in every band is no data
            place = data.transform @ Affine.translation(col, row)
            write_tif(tmp_path / f"{name}.tif", array, crs=data.crs, transform=place, nodata=0)
    rows = {"mars": "rt_cog_hirise_mars.tif", "wide": "rt_mosaic_cog1.tif"}
    lines = [f"{name},{scenes / path},{tmp_path / 'earlier.tif'}" for name, path in rows.items()]
    lines += [f"crop,{tmp_path / 'earlier.tif'},{tmp_path / 'later.tif'}"]
    bad = [p for p in sorted(broken.iterdir()) if p.suffix in (".tif", ".tiff", ".png", ".jp2", ".j2k", ".h5")]
    lines += [f"bad-{p.stem},{p},{tmp_path / 'earlier.tif'}" for p in bad]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,before,after", *lines]))
    code = run_batch(
        echo=lambda _: None,
        runner=run_in_order,
        settle=0,
        input=tmp_path / "pairs.csv",
        bundle=str(bundle.folder),
        output=tmp_path / "out",
    )
    assert code == ASIDE
    folder = tmp_path / "out" / bundle.title
    aside = {p.stem: json.loads(p.read_text())["code"] for p in folder.glob("set_aside/*.json")}
    assert set(aside) == {"mars", "wide", *(f"bad-{p.stem}" for p in bad)}
    assert "internal_error" not in aside.values()
    assert (aside["mars"], aside["wide"]) == ("no_overlap", "wrong_units")
    assert list(aside.values()).count("corrupt_file") >= 5
    assert cog_validate(folder / "crop_change.tif")[0]
    rows_found = geopandas.read_parquet(folder / "crop_polygons.parquet")
    told = json.loads((folder / "crop_areas.json").read_text())["areas"]
    assert told["changed"] == pytest.approx(rows_found.area_m2.sum() / 1e4, abs=1e-9)
    assert told["not observed"] > 0
    assert told["changed"] == pytest.approx(cells * 0.300038 * 0.300042 * 100, rel=0.01)  # ha a cell in the plane
    pystac.Item.from_file(folder / "crop_stac.json").validate(validator=offline())


def test_a_batch_of_pairs_is_told_before_it_runs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    before, after = write_pair(tmp_path)
    far = write_tif(tmp_path / "far.tif", ground(1), transform=transform(x=900_000.0))
    one = write_tif(tmp_path / "one.tif", ground()[:1])
    both = write_tif(tmp_path / "both.tif", ground()[:1])
    lines = [f"good,{before},{after}", f"far,{before},{far}", f"unlike,{before},{one}", f"grey,{one},{both}"]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,before,after", *lines]))
    arguments = ["plan", str(tmp_path / "pairs.csv"), "--bundle", str(bundle.folder), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "4 cases: 1 can run, 3 will be refused" in done.output
    assert "time: unknown" in done.output
    for refused in ("far: no_overlap", "unlike: wrong_channels", "grey: wrong_channels"):
        assert refused in done.output
    report = run(bundle, [before, after], tmp_path / "out")
    written = sum(facts["size"] for facts in report.outputs.values())
    cases = domain_of(bundle.task).cases_of([before, after], (), output=tmp_path / "out")
    told = forecast(cases, bundle, tmp_path / "out", memory=2**30)
    assert told.disk == pytest.approx(written, rel=0.01)  # as long as the pair before it
    assert told.seconds == pytest.approx(report.run["seconds"])


def test_maps_of_a_batch_are_scored_against_a_data_set(tmp_path: Path) -> None:
    scenes = {"A": ground(), "B": changed(ground()), "label": np.where(truth(), 255, 0)[None].repeat(3, 0)}
    for folder, scene in scenes.items():
        (tmp_path / "set" / folder).mkdir(parents=True)
        for name in ("test_1_0_0.png", "test_2_0_0.png"):
            Picture.fromarray(np.moveaxis(scene, 0, -1).astype(np.uint8)).save(tmp_path / "set" / folder / name)
    bundle = make_bundle(tmp_path / "bundle")
    domain, predictor = domain_of(bundle.task), Predictor.load(bundle, device="cpu")
    for case in domain.cases_of([tmp_path / "set"], (), output=tmp_path / "out"):
        domain.predict(predictor, case, tmp_path / "out", None)
    results = tmp_path / "out" / bundle.title
    arguments = ["evaluate", str(tmp_path / "set"), str(results), "--output", str(tmp_path / "scores")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "binary, 2 pairs of 2 scenes" in done.output
    told = json.loads((tmp_path / "scores/change_evaluation.json").read_text())["binary"]
    assert told["figures"]["f1"] == 1.0
    assert told["matrix"] == [[2 * int((~truth()).sum()), 0], [0, 2 * int(truth().sum())]]
    (results / "test_2_0_0_change.tif").unlink()
    with pytest.raises(ConfigError, match="1 of 2 pairs without a map\n  test__test_2_0_0"):
        evaluate_maps(read_layout(tmp_path / "set"), results)
