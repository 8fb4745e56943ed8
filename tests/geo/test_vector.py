"""Polygons: the same whichever slab, their areas are the cells, the mapping unit is accounted for, files agree."""

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio.features
from hypothesis import given
from hypothesis import strategies as st

from geo.crs import CellArea, transform_of
from geo.vector import Polygons, polygons
from geo.vector_files import Told, accounting, write_polygons
from medmamba.errors import GeometryError
from medmamba.grid import Grid
from medmamba.windows import Window
from tests.geo.maker import SceneOf, grid, texture

WANTED = frozenset({1, 2})
TOLD = Told(
    legend={1: ("field", "built"), 2: ("field", "water")}, date_from="2020-01-01", date_to="2024-01-01", model="m@1"
)


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 15), st.integers(0, 2**31))
def test_slabs_do_not_show(rows: int, cols: int, depth: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    codes = draw.choice(np.array([0, 1, 2, 254, 255], dtype="uint8"), (1, rows, cols), p=[0.2, 0.5, 0.2, 0.05, 0.05])
    on = grid((rows, cols), 30.0)
    source = SceneOf(codes, on, valid=codes[0] != 255)
    confidence = SceneOf(draw.integers(0, 101, (1, rows, cols)).astype("uint8"), on)
    area = CellArea(on)
    whole = polygons(source, area, WANTED, confidence=confidence, slab_rows=rows)
    cut = polygons(source, area, WANTED, confidence=confidence, slab_rows=depth)
    assert whole.kept == cut.kept  # every number and every corner
    counts = area.counts(Window.whole((rows, cols)))
    for code in WANTED:
        found = [p for p in cut.kept if p.code == code]
        assert sum(p.counts for p in found) == counts[codes[0] == code].sum()
        assert sum(p.cells for p in found) == (codes == code).sum()
    for p in cut.kept:
        assert p.geometry.is_valid
        assert p.geometry.area == pytest.approx(p.cells * 900, rel=1e-12)
        hit = rasterio.features.rasterize([p.geometry], (rows, cols), transform=transform_of(on)).astype(bool)
        assert hit.sum() == p.cells
        assert np.flatnonzero(hit)[0] == p.id
        values = confidence.image.array[0][hit] / 100
        assert p.confidence_mean == pytest.approx(values.mean())
        assert p.confidence_min == values.min()
        around = np.pad(codes[0] >= 254, 1, constant_values=True)
        near = around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
        assert p.edge == near[hit].any()


def test_a_ring_around_a_hole_and_two_corners() -> None:
    codes = np.zeros((1, 6, 6), dtype="uint8")
    codes[0, 1:5, 1:5] = 1
    codes[0, 2:4, 2:4] = 0
    codes[0, 5, 5] = 1  # touches the ring at one corner only: a polygon of its own
    on = grid((6, 6))
    ring, corner = polygons(SceneOf(codes, on), CellArea(on), WANTED, slab_rows=2).kept
    assert (ring.cells, len(ring.geometry.interiors), len(ring.geometry.exterior.coords)) == (12, 1, 5)
    assert (ring.edge, corner.edge) == (False, True)
    assert np.isnan(ring.confidence_mean)


def test_mapping_unit_and_accounting() -> None:
    codes = np.zeros((1, 40, 40), dtype="uint8")
    codes[0, 2:4, 2:4], codes[0, 10:20, 10:20], codes[0, 30, 30] = 1, 1, 2
    on = grid((40, 40))
    area = CellArea(on)
    found = polygons(SceneOf(codes, on), area, WANTED, least_area=1000.0)  # m2: ten cells
    assert [p.cells for p in found.kept] == [100]
    rows = accounting(found, TOLD)
    counts = area.counts(Window.whole((40, 40)))
    for row, code in zip(rows, (1, 2), strict=True):
        assert row["kept"] + row["below_mapping_unit"] == pytest.approx(
            area.hectares(int(counts[codes[0] == code].sum()))
        )
    assert rows[1]["polygons"] == 0


def test_files_hold_the_same_rows(tmp_path: Path) -> None:
    codes = (texture((120, 90), seed=2) * 8).astype("uint8") % 4
    on = grid((120, 90))
    found = polygons(SceneOf(codes, on), CellArea(on), WANTED, confidence=SceneOf(np.full_like(codes, 80), on))
    package, parquet = write_polygons(tmp_path / "change", found, TOLD)
    first = [p.read_bytes() for p in (package, parquet)]
    one, two = geopandas.read_file(package), geopandas.read_parquet(parquet)
    assert len(one) == len(two) == len(found.kept) > 10
    assert one.crs.to_epsg() == two.crs.to_epsg() == 32633
    assert one.geometry.geom_equals_exact(two.geometry, 0).all()
    names = [
        "id",
        "from",
        "to",
        "area_m2",
        "confidence_mean",
        "confidence_min",
        "edge",
        "date_from",
        "date_to",
        "model",
    ]
    assert set(names) <= set(one.columns)
    for name in names:
        assert one[name].tolist() == two[name].tolist()
    assert set(two["from"]) == {"field"}
    degrees = two.to_crs(two.crs.geodetic_crs)
    geodesic = [abs(two.crs.get_geod().geometry_area_perimeter(g)[0]) for g in degrees.geometry]
    np.testing.assert_allclose(two.area_m2, geodesic, rtol=1e-4)
    again = write_polygons(tmp_path / "change", found, TOLD)
    assert [p.read_bytes() for p in again] == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["change.gpkg", "change.parquet"]


def test_no_polygon_and_no_georeference(tmp_path: Path) -> None:
    on = Grid((5, 5), np.array([[0, 1, 0.5], [1, 0, 0.5], [0, 0, 1]]))
    codes = np.zeros((1, 5, 5), dtype="uint8")
    empty = polygons(SceneOf(codes, on), CellArea(on), WANTED)
    assert empty.kept == ()
    for path in write_polygons(tmp_path / "none", empty, TOLD):
        assert path.stat().st_size > 0
    assert len(geopandas.read_file(tmp_path / "none.gpkg")) == 0
    codes[0, 1:3] = 1
    found = polygons(SceneOf(codes, on), CellArea(on), WANTED)
    write_polygons(tmp_path / "cells", found, TOLD)
    read = geopandas.read_parquet(tmp_path / "cells.parquet")
    assert read.crs is None
    assert read.area_cells.tolist() == [10]
    with pytest.raises(GeometryError):
        polygons(SceneOf(codes, on), CellArea(grid((5, 5))), WANTED)
    assert isinstance(found, Polygons)
