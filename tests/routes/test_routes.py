"""Every route is a permutation for any shape and its inverse restores; what is special is checked beside it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.errors import ConfigError, ShapeError
from medmamba.routes import ROUTES, inverse, order_points, route
from medmamba.routes.order import coordinates

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
PLANES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PLANE_ONLY = {"spiral"}


def steps_between(order: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """City-block length (L-1,) of each step of the order."""
    return coordinates(shape)[order].diff(dim=0).abs().sum(dim=1)


@pytest.mark.parametrize("name", ROUTES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_permutation_and_inverse(name: str, data: st.DataObject) -> None:
    shape = data.draw(PLANES if name in PLANE_ONLY else SHAPES)
    order = route(name, shape)
    length = math.prod(shape)
    assert order.dtype == torch.long
    assert torch.equal(order.sort().values, torch.arange(length))
    values = torch.randn(2, length)
    assert torch.equal(values[:, order][:, inverse(order)], values)


@pytest.mark.parametrize("name", ["window", "atrous", "atrous_window", "multi_scale"])
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, first=st.integers(1, 9), second=st.integers(1, 5))
def test_parameters_keep_it_a_permutation(name: str, shape: tuple[int, ...], first: int, second: int) -> None:
    parameters = {
        "window": {"size": first},
        "atrous": {"rate": first},
        "atrous_window": {"size": first, "rate": second},
        "multi_scale": {"levels": second},
    }[name]
    assert torch.equal(ROUTES[name](shape, **parameters).sort().values, torch.arange(math.prod(shape)))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_snake_moves_by_one(shape: tuple[int, ...], data: st.DataObject) -> None:
    axes = data.draw(st.permutations(range(len(shape))))
    assert (steps_between(ROUTES["snake"](shape, axes=axes), shape) == 1).all()


@settings(max_examples=40, deadline=None)
@given(shape=PLANES)
def test_spiral_moves_by_one(shape: tuple[int, int]) -> None:
    assert (steps_between(route("spiral", shape), shape) == 1).all()


@pytest.mark.parametrize(("bits", "rank"), [(1, 1), (3, 1), (1, 2), (2, 2), (4, 2), (1, 3), (2, 3), (3, 3), (2, 4)])
def test_hilbert_is_continuous_on_a_power_of_two_cube(bits: int, rank: int) -> None:
    shape = (2**bits,) * rank
    assert (steps_between(route("hilbert", shape), shape) == 1).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rate=st.integers(1, 4))
def test_atrous_brings_positions_a_rate_apart_together(shape: tuple[int, ...], rate: int) -> None:
    """On the last axis x and x + rate are consecutive: `rate` times closer than in the raster."""
    step = inverse(ROUTES["atrous"](shape, rate=rate)).reshape(shape)
    assert (step[..., rate:] - step[..., :-rate] == 1).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, size=st.integers(1, 5), rate=st.integers(1, 3), name=st.sampled_from(["window", "atrous_window"]))
def test_a_window_is_left_only_when_it_is_done(shape: tuple[int, ...], size: int, rate: int, name: str) -> None:
    order = ROUTES[name](shape, size=size, **({"rate": rate} if name == "atrous_window" else {}))
    windows = [tuple(row) for row in (coordinates(shape)[order] // size).tolist()]
    visited = list(dict.fromkeys(windows))
    changes = sum(a != b for a, b in itertools.pairwise(windows))
    assert changes == len(visited) - 1
    assert visited == sorted(visited)


def test_atrous_window_visits_the_phases_of_each_window() -> None:
    order = ROUTES["atrous_window"]((1, 8), size=(1, 4), rate=2)
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, levels=st.integers(1, 4))
def test_multi_scale_begins_with_the_coarse_lattice(shape: tuple[int, ...], levels: int) -> None:
    coords = coordinates(shape)[ROUTES["multi_scale"](shape, levels=levels)]
    for level in range(levels):
        coarse = (coords % 2**level == 0).all(dim=1)
        assert coarse[: int(coarse.sum())].all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_inside_out_never_comes_closer(shape: tuple[int, ...]) -> None:
    coords = coordinates(shape)[route("inside_out", shape)].double()
    distance = (coords - (torch.tensor(shape, dtype=torch.float64) - 1) / 2).square().sum(dim=1)
    assert (distance.diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES)
def test_diagonals_come_in_turn(shape: tuple[int, ...]) -> None:
    assert (coordinates(shape)[route("diagonal", shape)].sum(dim=1).diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_coordinate_sorts_by_its_axis(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    assert (coordinates(shape)[ROUTES["coordinate"](shape, axis=axis)][:, axis].diff() >= 0).all()


# Written by hand on a 3 x 4 grid (flat positions 0..11, rows 0-3, 4-7, 8-11).
BY_HAND = {
    "raster": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "column": [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
    "snake": [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
    "diagonal": [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11],
    "spiral": [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6],
    "atrous": [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 5, 7],
    "multi_scale": [0, 2, 8, 10, 1, 3, 4, 5, 6, 7, 9, 11],
    "morton": [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    assert route(name, (3, 4)).tolist() == BY_HAND[name]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, name=st.sampled_from(["raster", "hilbert", "morton", "inside_out", "coordinate"]), data=st.data())
def test_points_follow_the_route_of_their_cells(shape: tuple[int, ...], name: str, data: st.DataObject) -> None:
    cell = st.tuples(*(st.integers(0, n - 1) for n in shape))
    cells = torch.tensor(data.draw(st.lists(cell, min_size=1, max_size=12)))
    order = route(name, shape)
    points = order_points(cells, shape, order)
    flat = [int(c @ _strides(shape)) for c in cells]
    rank = inverse(order)
    expected = sorted(range(len(flat)), key=lambda i: (int(rank[flat[i]]), i))
    assert points.tolist() == expected


def _strides(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])


@pytest.mark.parametrize("shape", [(), (0, 3), (4, -1)])
def test_a_bad_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="a route needs"):
        route("raster", shape)


def test_spiral_wants_two_axes() -> None:
    with pytest.raises(ShapeError, match="2 only"):
        route("spiral", (2, 2, 2))


def test_curves_say_when_the_key_is_too_long() -> None:
    with pytest.raises(ShapeError, match="bits"):
        route("morton", (2**32, 1))


def test_bad_parameters_and_names() -> None:
    with pytest.raises(ConfigError, match=r"known: raster, column"):
        route("zigzag", (2, 2))
    with pytest.raises(ConfigError, match="size=0"):
        ROUTES["window"]((4, 4), size=0)
    with pytest.raises(ConfigError, match="one number or 2"):
        ROUTES["atrous"]((4, 4), rate=(2, 2, 2))
    with pytest.raises(ConfigError, match="axis=2"):
        ROUTES["coordinate"]((4, 4), axis=2)
    with pytest.raises(ConfigError, match="permutation"):
        ROUTES["snake"]((4, 4), axes=(0, 0))


def test_points_outside_the_grid_are_refused() -> None:
    order = route("raster", (2, 2))
    with pytest.raises(ShapeError, match="outside"):
        order_points(torch.tensor([[0, 2]]), (2, 2), order)
    with pytest.raises(ShapeError, match="expected"):
        order_points(torch.tensor([[0, 1, 1]]), (2, 2), order)
    with pytest.raises(ShapeError, match="does not fit"):
        order_points(torch.tensor([[0, 1]]), (2, 3), order)
