"""Confidence: the threshold is the best of all, the curve repairs a distorted one, tiles add, bad input refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import ConfigError, ShapeError
from pipelines.scoring.change_calibration import ConfidenceTally, calibrate, pool_adjacent
from pipelines.scoring.change_metrics import ChangeTally


def scenes(seed: int, *, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities of change told as their `power`, and what happened."""
    rng = np.random.default_rng(seed)
    probability = rng.random((200, 200)) ** 2
    return probability**power, rng.random((200, 200)) < probability


def test_an_honest_confidence_is_called_honest_and_a_distorted_one_is_repaired() -> None:
    honest, distorted, repaired = ConfidenceTally(), ConfidenceTally(), ConfidenceTally()
    honest.add(*scenes(0))
    distorted.add(*scenes(0, power=0.3))
    confidence, happened = scenes(1, power=0.3)
    repaired.add(calibrate(confidence, distorted.curve()), happened)
    errors = [tally.calibration_error() for tally in (honest, distorted, repaired)]
    assert errors[0] is not None
    assert errors[0] < 0.03  # 40,000 pixels in 256 bins scatter by about 0.025
    assert errors[1] is not None
    assert errors[1] > 0.25
    assert errors[2] is not None
    assert errors[2] < 0.03
    assert (np.diff(distorted.curve()) >= 0).all()
    rows = honest.reliability(5)
    assert sum(row["pixels"] for row in rows) == 40000
    assert all(abs(row["confidence"] - row["changed"]) < 0.03 for row in rows)


def test_threshold_is_the_best_of_all_edges() -> None:
    confidence, happened = scenes(2, power=0.5)
    tally = ConfidenceTally(16)
    tally.add(confidence, happened)
    found = {}
    for edge in range(16):
        scored = ChangeTally("binary")
        scored.add_binary("a", np.floor(confidence * 16) >= edge, happened)
        found[edge / 16] = scored.figures()["f1"]
    threshold, f1 = tally.threshold()
    assert f1 == pytest.approx(max(found.values()))
    assert found[threshold] == pytest.approx(f1)
    assert found[0.5] < f1 - 0.005


def test_tiles_add_and_invalid_pixels_do_not_count() -> None:
    confidence, happened = scenes(3)
    valid = np.random.default_rng(0).random(confidence.shape) < 0.5
    whole, tiled = ConfidenceTally(), ConfidenceTally()
    whole.add(confidence[valid], happened[valid])
    for rows in (slice(150, None), slice(0, 150)):
        tiled.add(confidence[rows], happened[rows], valid[rows])
    assert np.array_equal(whole.pixels, tiled.pixels)
    assert np.array_equal(whole.changed, tiled.changed)
    np.testing.assert_allclose(whole.confidence, tiled.confidence)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=12))
def test_pooled_values_never_fall_and_keep_the_weighted_mean(pairs: list[tuple[float, float]]) -> None:
    values, weights = (np.array(part) for part in zip(*pairs))
    pooled = pool_adjacent(values, weights)
    assert (np.diff(pooled) >= 0).all()
    assert pooled @ weights == pytest.approx(values @ weights)
    rising = np.sort(values)
    assert np.array_equal(pool_adjacent(rising, weights), rising)


def test_what_cannot_be_calibrated_is_refused() -> None:
    tally = ConfidenceTally()
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        tally.curve()
    assert tally.calibration_error() is None
    tally.add(np.full((2, 2), 1.0), np.zeros((2, 2)))
    with pytest.raises(ConfigError, match="no changed pixel"):
        tally.threshold()
    with pytest.raises(ConfigError, match="after the softmax"):
        tally.add(np.full((2, 2), 1.5), np.zeros((2, 2)))
    with pytest.raises(ShapeError, match="differ in shape"):
        tally.add(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="2 or more"):
        ConfidenceTally(1)
