import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import ConfigError, InputError
from medmamba.grid import RAS, Grid
from medmamba.preprocessing import Channel, Preprocessing, canonical_axes
from medmamba.sample import Image
from medmamba.source import ArraySink, ArraySource, read_all
from medmamba.windows import Window, Windowing

WINDOWING = Windowing(size=(4, 4, 4), overlap=(2, 2, 2))


def volume(affine: np.ndarray, shape: tuple[int, ...] = (6, 7, 8), seed: int = 0) -> ArraySource:
    array = np.random.default_rng(seed).normal(5, 2, size=(1, *shape)).astype(np.float32)
    return ArraySource(Image(array, Grid(shape, affine, RAS), ("0",)))


def affine_of(order: list[int], signs: list[int], scale: tuple[float, float, float]) -> np.ndarray:
    affine = np.zeros((4, 4))
    for axis, world in enumerate(order):
        affine[world, axis] = signs[axis] * scale[world]
    affine[:, 3] = (3, -4, 5, 1)
    return affine


@given(st.permutations([0, 1, 2]), st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
def test_canonical_axes_point_up(order: list[int], signs: list[int]) -> None:
    grid = Grid((4, 5, 6), affine_of(order, signs, (1, 2, 3)), RAS)
    turned = grid.permute(*canonical_axes(grid))
    np.testing.assert_allclose(turned.affine[:3, :3], np.array([[0, 0, 1], [0, 2, 0], [3, 0, 0]]))


@given(st.permutations([0, 1, 2]), st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3), st.booleans())
def test_scores_come_back_onto_the_files_own_grid(order: list[int], signs: list[int], resampled: bool) -> None:
    """A smooth field shown to the network and sent back must be itself, exactly when nothing is resampled."""
    contract = Preprocessing(
        channels=(Channel(role="t1", scaling="fixed"),),
        windowing=WINDOWING,
        spacing=(1.5, 1.0, 0.5) if resampled else None,
    )
    grid = Grid((6, 7, 8), affine_of(order, signs, (0.5, 1.0, 1.5)), RAS)
    index = np.indices(grid.shape).reshape(3, -1)
    world = (grid.affine[:3, :3] @ index + grid.affine[:3, 3:]).reshape(3, *grid.shape)
    field = (world[0] + 2 * world[1] - world[2]).astype(np.float32)
    source = ArraySource(Image(field[None], grid, ("0",)))
    seen = read_all(contract.forward({"t1": source}))
    back = ArraySink(1, grid.shape)
    sink = contract.inverse(back, grid)
    sink.write(Window.whole(seen.grid.shape), seen.array)
    if not resampled:
        assert np.array_equal(back.array[0], field)
    else:
        inner = tuple(slice(1, -1) for _ in grid.shape)
        np.testing.assert_allclose(back.array[0][inner], field[inner], atol=1e-3)


def test_zscore_is_of_the_whole_image_not_of_the_window() -> None:
    source = volume(np.eye(4))
    contract = Preprocessing(channels=(Channel(role="t1"),), windowing=WINDOWING)
    seen = contract.forward({"t1": source})
    whole = read_all(seen).array
    assert abs(float(whole.mean())) < 1e-5
    assert float(whole.std()) == pytest.approx(1, abs=1e-5)
    window = Window(start=(1, 2, 1), size=(4, 4, 4))
    assert np.array_equal(seen.read(window).array, whole[(slice(None), *window.slices)])


def test_statistics_do_not_depend_on_the_axis_order_of_the_file() -> None:
    one = volume(affine_of([2, 1, 0], [1, 1, 1], (1, 1, 1)), (6, 7, 8))
    turned = one.image.array.transpose(0, 3, 1, 2)[:, ::-1]
    grid = one.grid.permute([2, 0, 1], [True, False, False])
    other = ArraySource(Image(turned, grid, ("0",)))
    contract = Preprocessing(channels=(Channel(role="t1"),), windowing=WINDOWING)
    a, b = (read_all(contract.forward({"t1": s})).array for s in (one, other))
    assert np.array_equal(a, b)


def test_nan_is_invalid_and_zero_and_many_are_refused() -> None:
    source = volume(np.eye(4))
    source.image.array[0, 0, 0, 0] = np.nan
    contract = Preprocessing(channels=(Channel(role="t1"),), windowing=WINDOWING)
    seen = read_all(contract.forward({"t1": source}))
    assert seen.valid is not None
    assert not seen.valid[0, 0, 0]
    assert np.isfinite(seen.array).all()
    source.image.array[0, :3] = np.inf
    with pytest.raises(InputError) as caught:
        contract.forward({"t1": source})
    assert caught.value.code == "non_finite"


def test_bad_cases_have_their_codes() -> None:
    two = Preprocessing(channels=(Channel(role="t1"), Channel(role="t2")), windowing=WINDOWING)
    shifted = np.eye(4)
    shifted[0, 3] = 1
    flat = ArraySource(Image(np.ones((1, 6, 7, 8), np.float32), Grid((6, 7, 8), np.eye(4), RAS), ("0",)))
    many = ArraySource(Image(np.ones((3, 6, 7, 8), np.float32), flat.grid, ("0", "1", "2")))
    good = volume(np.eye(4))
    for sources, code in [
        ({"t1": good}, "missing_channel"),
        ({"t1": good, "t2": volume(shifted)}, "grid_mismatch"),
        ({"t1": good, "t2": many}, "wrong_channels"),
        ({"t1": good, "t2": flat}, "empty_image"),
    ]:
        with pytest.raises(InputError) as caught:
            two.forward(sources)
        assert caught.value.code == code


def test_a_4d_file_serves_a_contract_that_names_its_volume() -> None:
    array = np.random.default_rng(0).normal(size=(3, 6, 7, 8)).astype(np.float32)
    source = ArraySource(Image(array, Grid((6, 7, 8), np.eye(4), RAS), ("0", "1", "2")))
    channels = tuple(Channel(role="dwi", volume=v, scaling="fixed") for v in (2, 0))
    contract = Preprocessing(channels=channels, windowing=WINDOWING, canonical=False)
    assert contract.roles == ("dwi",)
    assert np.array_equal(read_all(contract.forward({"dwi": source})).array, array[[2, 0]])


def test_json_round_trip_and_refusals() -> None:
    contract = Preprocessing(
        channels=(Channel(role="ct", clip=(-200.0, 300.0), scaling="fixed", shift=50.0, scale=250.0),),
        windowing=WINDOWING,
        spacing=(1.5, 1.5, 1.5),
    )
    assert Preprocessing.from_json(json.loads(json.dumps(contract.to_json()))) == contract
    with pytest.raises(ConfigError, match="known: fixed, zscore"):
        Channel(role="ct", scaling="minmax")
    with pytest.raises(ConfigError, match="must rise"):
        Channel(role="ct", clip=(3.0, 3.0))
    with pytest.raises(ConfigError, match="spacing"):
        Preprocessing(channels=contract.channels, windowing=WINDOWING, spacing=(1.0, 1.0))


def test_wrong_units_and_nan_are_refused_before_the_first_window() -> None:
    """CT without its intercept (0..4095) or scaled to 0..1 is not Hounsfield; a scaling that is fixed needs no pass of
    statistics, and is refused all the same."""
    channel = Channel(role="ct", clip=(-200, 300), scaling="fixed", low_between=(-1200, -500), high_between=(100, 2000))
    contract = Preprocessing(channels=(channel,), windowing=WINDOWING, canonical=False)
    hounsfield = np.random.default_rng(0).uniform(-1000, 900, (1, 6, 7, 8)).astype(np.float32)
    holes = hounsfield.copy()
    holes[0, :1] = np.nan
    grid = Grid((6, 7, 8), np.eye(4), RAS)
    assert contract.forward({"ct": ArraySource(Image(hounsfield, grid, ("0",)))}).grid == grid
    for array, code in [(hounsfield + 1024, "wrong_units"), (hounsfield / 4096, "wrong_units"), (holes, "non_finite")]:
        with pytest.raises(InputError) as caught:
            contract.forward({"ct": ArraySource(Image(array, grid, ("0",)))})
        assert caught.value.code == code
    assert Preprocessing.from_json(json.loads(json.dumps(contract.to_json()))) == contract
    with pytest.raises(ConfigError, match="low_between"):
        Channel(role="ct", low_between=(1.0, 0.0))
