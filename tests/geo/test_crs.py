"""Corners to centres and back, frames, and areas of the ellipsoid."""

import numpy as np
import pyproj
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS

from geo.crs import CellArea, crs_of, frame_of, grid_of, transform_of
from medmamba.errors import InputError
from medmamba.grid import Grid
from medmamba.windows import Window
from tests.geo.maker import grid

number = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.tuples(*[number] * 6))
def test_corner_transform_comes_back(values: tuple[float, ...]) -> None:
    a, b, c, d, e, f = values
    if abs(a * e - b * d) < 1e-2:
        return
    transform = Affine(a, b, c, d, e, f)
    made = grid_of(transform, (3, 4), None)
    assert transform_of(made).almost_equals(transform, 1e-6)
    centre = [a / 2 + b / 2 + c, d / 2 + e / 2 + f]  # GDAL counts (col, row) from the corner
    np.testing.assert_allclose(made.affine[:2, 2], centre, atol=1e-9)


def test_frames() -> None:
    assert frame_of(CRS.from_epsg(32633)) == "EPSG:32633"
    assert frame_of(None) == "pixels"
    assert crs_of("pixels") is None
    odd = CRS.from_proj4("+proj=laea +lat_0=12 +lon_0=34 +ellps=WGS84")
    assert frame_of(odd).startswith("PROJCRS[")
    assert crs_of(frame_of(odd)) == odd
    with pytest.raises(InputError, match="cannot be inverted") as error:
        grid_of(Affine(0, 0, 1, 0, 0, 1), (2, 2), None)
    assert error.value.code == "bad_geometry"


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857", "EPSG:3035", "ESRI:102001"])
def test_cells_add_up_to_the_geodesic_polygon(crs: str) -> None:
    """Sum of cells against Karney's geodesic area of the densified outline: another method, another library."""
    x, y, side = (10.0, 60.0, 0.004) if crs == "EPSG:4326" else (4.2e5, 5.1e6, 300.0)
    made = grid_of(Affine(side, 0, x, 0, -side, y), (300, 200), CRS.from_user_input(crs))
    area = CellArea(made)
    total = int(area.counts(Window.whole(made.shape)).sum()) * area.quantum
    t, zero = np.linspace(0, 1, 2000), np.zeros(2000)
    rows = 300 * np.concatenate([zero, t, zero + 1, t[::-1]])
    cols = 200 * np.concatenate([t, zero + 1, t[::-1], zero])
    world = pyproj.CRS.from_user_input(crs)
    to_degrees = pyproj.Transformer.from_crs(world, world.geodetic_crs, always_xy=True)
    a, b, c, d, e, f = tuple(transform_of(made))[:6]
    lon, lat = to_degrees.transform(a * cols + b * rows + c, d * cols + e * rows + f)
    expected = abs(world.get_geod().polygon_area_perimeter(lon, lat)[0])
    assert total == pytest.approx(expected, rel=1e-6)  # the outline has straight pieces, 2000 a side


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39), st.integers(0, 39))
def test_areas_do_not_depend_on_the_window(rows: int, cols: int, row: int, col: int) -> None:
    made = grid((40, 40), 30.0)
    area = CellArea(made)
    window = Window(start=(min(row, 40 - rows), min(col, 40 - cols)), size=(rows, cols))
    np.testing.assert_array_equal(area.counts(window), area.counts(Window.whole((40, 40)))[window.slices])


def test_no_georeference_counts_cells() -> None:
    area = CellArea(Grid((3, 4), np.eye(3)))
    assert area.unit == "cells"
    assert area.hectares(int(area.counts(Window.whole((3, 4))).sum())) == 12


def test_off_the_earth_is_refused() -> None:
    disc = CRS.from_proj4("+proj=geos +h=35785831 +lon_0=0 +ellps=WGS84")
    with pytest.raises(InputError) as error:
        CellArea(grid_of(Affine(1e5, 0, -6e6, 0, -1e5, 6e6), (120, 120), disc))
    assert error.value.code == "bad_geometry"
