"""What a patch of two dates may also look like: the dates exchanged, one date twice, other light on a date, a quarter
turn. They teach a network what is no change: `check_model` asks it of every trained one.

Letters: C channels, the earlier date's bands and then the later date's; L planes of labels.
"""

from __future__ import annotations

import numpy as np

from pipelines.learning.change_run import PairAugmentSection
from pipelines.learning.losses import IGNORED


def varied(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, settings: PairAugmentSection
) -> tuple[np.ndarray, np.ndarray]:
    """A patch (C, H, W) with its labels (L, H, W) as `settings` let it be drawn; a turn only where H = W."""
    chances, light = rng.random(4), rng.uniform(-1, 1, (2, 2, len(image) // 2, 1, 1)).astype(np.float32)
    dates = np.split(image, 2)
    if chances[0] < settings.same:
        dates = [dates[int(rng.integers(2))]] * 2
        labels = np.where(labels == IGNORED, labels, 0)
    elif chances[1] < settings.swap:
        dates, labels = dates[::-1], swapped(labels)
    if chances[2] < settings.light:
        gains, offsets = 1 + settings.light_gain * light[0], settings.light_offset * light[1]
        dates = [date * gain + offset for date, gain, offset in zip(dates, gains, offsets, strict=True)]
    seen = np.concatenate(dates)
    if chances[3] < settings.turn and image.shape[1] == image.shape[2]:
        seen, labels = (np.rot90(array, axes=(1, 2)) for array in (seen, labels))
    return seen, labels


def swapped(labels: np.ndarray) -> np.ndarray:
    """Labels of the same change backwards in time: the classes at both dates exchanged."""
    return labels[[0, 2, 1]] if len(labels) == 3 else labels
