"""What a patch of two dates is turned into: the same labels move with it, and no change is taught as no change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.learning.change_run import PairAugmentSection
from pipelines.learning.change_variations import swapped, varied
from pipelines.learning.losses import IGNORED

OFF = {"swap": 0.0, "same": 0.0, "light": 0.0, "turn": 0.0}
SIDE = 12


def patch(planes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two dates that differ where they changed; labels with a row that nobody labelled."""
    draw = np.random.default_rng(1)
    image = draw.normal(size=(6, SIDE, SIDE)).astype(np.float32)
    labels = np.stack([draw.integers(0, k, (SIDE, SIDE)) for k in (2, 5, 5)]).astype(np.int16)[:planes]
    labels[:, 0] = IGNORED
    image[3:] = image[:3] + 5 * (labels[0] == 1)
    return image, labels


def one(seed: int, planes: int = 3, **chances: float) -> tuple[Any, ...]:
    settings = PairAugmentSection(**{**OFF, **chances})
    given = patch(planes)
    return (*given, *varied(*given, np.random.default_rng(seed), settings=settings))


@pytest.mark.parametrize("planes", [1, 3])
def test_exchanged_dates_have_exchanged_classes(planes: int) -> None:
    image, labels, seen, told = one(0, planes, swap=1.0)
    assert np.array_equal(seen, np.concatenate([image[3:], image[:3]]))
    assert np.array_equal(told[0], labels[0])
    if planes == 3:
        assert np.array_equal(told[1:], labels[[2, 1]])
    assert np.array_equal(swapped(told), labels)


def test_one_date_twice_is_no_change_and_unlabelled_stays_so() -> None:
    firsts = set()
    for seed in range(8):
        image, labels, seen, told = one(seed, same=1.0)
        assert np.array_equal(seen[:3], seen[3:])
        firsts.add(int(np.array_equal(seen[:3], image[:3])))
        assert set(np.unique(told)) == {0, IGNORED}
        assert np.array_equal(told == IGNORED, labels == IGNORED)
    assert firsts == {0, 1}  # either date


def test_light_differs_between_the_dates_and_moves_no_label() -> None:
    image, labels, seen, told = one(3, light=1.0)
    assert np.array_equal(told, labels)
    gains = [np.polyfit(old.ravel(), new.ravel(), 1) for old, new in zip(image, seen, strict=True)]
    fitted = [np.abs(np.polyval(g, o.ravel()) - n.ravel()).max() for g, o, n in zip(gains, image, seen, strict=True)]
    assert max(fitted) < 1e-5  # a gain and an offset a band, nothing else
    assert len({round(float(gain), 6) for gain, _ in gains}) == 6
    assert all(abs(gain - 1) <= 0.2 + 1e-6 and abs(offset) <= 0.1 + 1e-6 for gain, offset in gains)


def test_a_turn_moves_both_dates_and_the_labels_alike() -> None:
    image, labels, seen, told = one(0, turn=1.0)
    assert np.array_equal(seen, np.rot90(image, axes=(1, 2)))
    assert np.array_equal(told, np.rot90(labels, axes=(1, 2)))
    settings = PairAugmentSection(**{**OFF, "turn": 1.0})
    wide = image[:, :6], labels[:, :6]
    again = varied(*wide, np.random.default_rng(0), settings=settings)
    assert np.array_equal(again[0], wide[0])  # a window that is not square keeps its shape


def test_nothing_asked_changes_nothing() -> None:
    image, labels, seen, told = one(0)
    assert np.array_equal(seen, image)
    assert np.array_equal(told, labels)
