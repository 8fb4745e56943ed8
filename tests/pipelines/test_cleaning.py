"""Cleaning of label maps: what each step keeps, that labels do not harm each other, and how steps are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from pipelines.tasks.cleaning import CHOICES, choose, clean, fill_holes, largest_component, pieces, trial

masks = arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)).filter(lambda m: m.any())


@given(masks)
def test_largest_component_is_the_largest_of_scipy(mask: np.ndarray) -> None:
    parts, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 3))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    kept = largest_component(mask.copy())
    assert kept.sum() == sizes.max()
    assert not (kept & ~mask).any()
    assert ndimage.label(kept, ndimage.generate_binary_structure(3, 3))[1] == 1


def test_a_column_of_cells_has_components_too() -> None:
    for shape in ((3, 1, 1), (1, 5, 1), (1, 1, 9)):
        mask = (np.arange(max(shape)) % 2 == 0).reshape(shape)
        assert largest_component(mask.copy()).sum() == 1


@given(masks)
def test_holes_are_those_of_scipy(mask: np.ndarray) -> None:
    assert np.array_equal(fill_holes(mask.copy()), ndimage.binary_fill_holes(mask))


def test_two_dimensions_too() -> None:
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert fill_holes(ring).all()
    two = np.zeros((5, 7), bool)
    two[0, 0] = two[3:, 3:] = True
    assert largest_component(two).sum() == two[3:, 3:].size


def test_labels_do_not_harm_each_other() -> None:
    labels = np.zeros((7, 7, 7), np.uint8)
    labels[1:6, 1:6, 1:6] = 1
    labels[3, 3, 3] = 2  # an island in a hole of label 1
    labels[2, 2, 2] = 0  # a true hole
    labels[0, 0, 0] = 2
    result = clean(labels.copy(), {1: ("fill_holes",), 2: ()})
    assert result[2, 2, 2] == 1
    assert result[3, 3, 3] == 2
    result = clean(labels.copy(), {2: ("largest_component",)})
    assert (result == 2).sum() == 1
    assert np.array_equal(result == 1, labels == 1)


def test_fewest_steps_win_a_tie() -> None:
    assert len(CHOICES) == 4
    assert choose({(): [0.5, 0.7], ("fill_holes",): [0.6, 0.6], ("largest_component",): [0.5, 0.5]}) == ()
    assert choose({(): [0.5], ("fill_holes",): [0.6]}) == ("fill_holes",)


@pytest.mark.parametrize("steps", CHOICES)
def test_an_empty_label_stays_empty(steps: tuple[str, ...]) -> None:
    assert not clean(np.zeros((3, 3, 3), np.uint8), {1: steps}).any()


@given(arrays(np.uint8, st.tuples(*[st.integers(1, 6)] * 3), elements=st.integers(0, 3)))
def test_pieces_are_counted_as_scipy_counts_them(labels: np.ndarray) -> None:
    found = {int(v): ndimage.label(labels == v, ndimage.generate_binary_structure(3, 3))[1] for v in np.unique(labels)}
    assert pieces(labels) == {v: n for v, n in found.items() if v}


@given(arrays(np.uint8, (5, 6, 5), elements=st.integers(0, 3)), arrays(np.uint8, (5, 6, 5), elements=st.integers(0, 3)))
def test_a_trial_is_the_dice_of_what_cleaning_writes(found: np.ndarray, truth: np.ndarray) -> None:
    tried = trial(found, truth, (1, 2), ignore=3)
    for value, dice in tried.items():
        for steps, told in dice.items():
            a, b = (clean(found.copy(), {value: steps}) == value) & (truth != 3), truth == value
            assert told == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()) if b.any() or a.any() else 0)
    for value in {1, 2} - set(tried):
        assert not (truth == value).any()
        assert not ((found == value) & (truth != 3)).any()
