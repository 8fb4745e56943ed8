"""One stretch for both dates; unchanged pixels bring the second date to the first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geo.radiometry import NormalisedSource, StretchedSource, common_stretch, invariant_fit, sample
from medmamba.errors import InputError
from medmamba.source import read_all
from medmamba.windows import Window
from tests.geo.maker import SceneOf, texture


def test_one_outlier_does_not_change_a_scene() -> None:
    """A peer's per-date stretch turned two equal scenes with one outlier into 40.9 against 6.6 DN."""
    first = (texture((200, 220), 3) * 1000).astype("uint16")
    second = first.copy()
    second[:, 5, 5] = 65535
    sources = SceneOf(first), SceneOf(second)
    stretch = common_stretch(sources)
    one, two = (read_all(StretchedSource(s, stretch)).array for s in sources)
    assert np.abs(one - two).max(initial=0, where=second < 65535) == 0
    assert (one.min(), one.max(), one.dtype) == (0, 1, np.dtype("float32"))


def test_invalid_cells_neither_vote_nor_shine() -> None:
    array = np.full((1, 50, 50), 10.0)
    array[:, :, 25:] = 20
    array[:, :10] = -9999
    valid = array[0] > 0
    scene = SceneOf(array, valid=valid)
    stretch = common_stretch([scene])
    assert (stretch.low, stretch.high) == ((10.0,), (20.0,))
    assert (read_all(StretchedSource(scene, stretch)).array[0][~valid] == 0).all()
    with pytest.raises(InputError) as error:
        common_stretch([SceneOf(array, valid=np.zeros_like(valid))])
    assert error.value.code == "empty_image"


@settings(max_examples=8)
@given(st.floats(0.5, 2.0), st.floats(-0.3, 0.3), st.floats(0, 0.35))
def test_gain_and_offset_come_back(gain: float, offset: float, changed: float) -> None:
    """after = (before - offset) / gain with noise; up to 35 % of the ground replaced by something else."""
    before = texture((128, 128), 2)
    after = (before - offset) / gain + np.random.default_rng(0).normal(0, 0.005, before.shape)
    rows = int(128 * changed)
    after[:, :rows] = texture((rows, 128), 2, seed=8) * 3 + 1 if rows else after[:, :rows]
    fit = invariant_fit(SceneOf(before), SceneOf(after))
    for band in fit.bands:
        assert band.used
        assert band.gain == pytest.approx(gain, rel=0.03)
        assert band.offset == pytest.approx(offset, abs=0.03 * gain)
        assert band.kept > 0.4
    same = np.abs(read_all(NormalisedSource(SceneOf(after), fit)).array - before)[:, rows:]
    assert same.mean() < 0.02 * gain + 0.01


def test_unlike_dates_are_left_as_they_are() -> None:
    fit = invariant_fit(SceneOf(texture((128, 128))), SceneOf(texture((128, 128), seed=4)))
    (band,) = fit.bands
    assert (band.used, band.gain, band.offset) == (False, 1.0, 0.0)
    assert fit.to_json()["pixels"] == 128 * 128


def test_sample_is_the_same_cells_everywhere() -> None:
    array = texture((300, 90), 2)
    one, two = sample([SceneOf(array), SceneOf(array * 2)])
    np.testing.assert_array_equal(one * 2, two)
    stretch = common_stretch([SceneOf(array)])
    source = StretchedSource(SceneOf(array), stretch)
    window = Window(start=(17, 3), size=(40, 50))
    np.testing.assert_array_equal(source.read(window).array, read_all(source).array[(slice(None), *window.slices)])
