import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import GeometryError
from medmamba.grid import RAS, Grid


def random_grid(seed: int, rank: int) -> Grid:
    rng = np.random.default_rng(seed)
    affine = np.eye(rank + 1)
    affine[:-1, :-1] = np.linalg.qr(rng.normal(size=(rank, rank)))[0] * rng.uniform(0.3, 4, rank) + 0.05
    affine[:-1, -1] = rng.normal(size=rank) * 50
    return Grid(tuple(rng.integers(1, 9, rank).tolist()), affine, RAS)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(-3, 3))
def test_crop_moves_the_origin_and_nothing_else(seed: int, rank: int, start: int) -> None:
    grid = random_grid(seed, rank)
    moved = grid.crop([start] * rank, grid.shape)
    index = np.arange(rank) + 2.0
    world = moved.affine[:-1, :-1] @ index + moved.affine[:-1, -1]
    np.testing.assert_allclose(world, grid.affine[:-1, :-1] @ (index + start) + grid.affine[:-1, -1], atol=1e-9)
    assert grid.pad([2] * rank, [1] * rank).crop([2] * rank, grid.shape).matches(grid)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 12))
def test_zoom_keeps_the_edges_of_the_box(seed: int, rank: int, cells: int) -> None:
    grid = random_grid(seed, rank)
    zoomed = grid.zoom([cells] * rank)
    for low in (True, False):
        edge = np.full(rank, -0.5) if low else np.array(grid.shape) - 0.5
        there = np.full(rank, -0.5) if low else np.full(rank, cells - 0.5)
        a = grid.affine[:-1, :-1] @ edge + grid.affine[:-1, -1]
        b = zoomed.affine[:-1, :-1] @ there + zoomed.affine[:-1, -1]
        np.testing.assert_allclose(a, b, atol=1e-9)


@given(st.integers(0, 10**6), st.permutations([0, 1, 2]), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_permute_names_the_same_cells(seed: int, order: list[int], flips: tuple[bool, ...]) -> None:
    grid = random_grid(seed, 3)
    new = grid.permute(order, flips)
    index = [n - 1 for n in new.shape]
    old = [0, 0, 0]
    for axis, source in enumerate(order):
        old[source] = new.shape[axis] - 1 - index[axis] if flips[axis] else index[axis]
    a = new.affine[:-1, :-1] @ index + new.affine[:-1, -1]
    np.testing.assert_allclose(a, grid.affine[:-1, :-1] @ old + grid.affine[:-1, -1], atol=1e-9)
    assert new.cell_volume == pytest.approx(grid.cell_volume)


def test_equality_is_exact_and_matches_is_not() -> None:
    grid = Grid((4, 5), np.diag([2.0, 3.0, 1.0]))
    affine = grid.affine.copy()
    affine[0, 2] += 1e-5
    other = Grid((4, 5), affine)
    assert grid != other
    assert grid.matches(other)
    affine[0, 2] += 0.1
    assert not grid.matches(Grid((4, 5), affine))
    assert grid.spacing == (2.0, 3.0)
    assert not grid.affine.flags.writeable


@pytest.mark.parametrize("affine", [np.full((3, 3), np.nan), np.zeros((3, 3)), np.eye(4)])
def test_an_unusable_affine_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(GeometryError, match="affine"):
        Grid((4, 5), affine)
