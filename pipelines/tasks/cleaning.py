"""What is done to a finished label map, label by label, where it scored better on held-out cases: `CLEANING`.

Whole-case steps, so they come after the last slab. Connected components with 26 neighbours (cc3d), holes with 6
(fill_voids), as nnU-Net's and TotalSegmentator's users know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

Mask = np.ndarray  # (*space) bool


def largest_component(mask: Mask) -> Mask:
    """The largest connected part of a mask that is not empty."""
    import cc3d

    kept: Mask = cc3d.largest_k(np.ascontiguousarray(mask), k=1, connectivity=26 if mask.ndim == 3 else 8) > 0
    return kept


def fill_holes(mask: Mask) -> Mask:
    """The mask with every hole filled that does not reach the border of the image."""
    import fill_voids

    filled: Mask = fill_voids.fill(np.ascontiguousarray(mask)).astype(bool)
    return filled


CLEANING: dict[str, Callable[[Mask], Mask]] = {"largest_component": largest_component, "fill_holes": fill_holes}
CHOICES: tuple[tuple[str, ...], ...] = tuple(c for n in range(len(CLEANING) + 1) for c in combinations(CLEANING, n))


def cleaned(mask: Mask, steps: Iterable[str]) -> Mask:
    """The mask after the named steps; an empty one stays as it is."""
    for step in steps if mask.any() else ():
        mask = CLEANING[step](mask)
    return mask


def clean(labels: np.ndarray, steps: Mapping[int, Sequence[str]]) -> np.ndarray:
    """Labels (*space) with the steps of each value done. Cells that a value loses become 0; holes are filled only where
    no other label lies."""
    result = labels.copy()
    for value, names in steps.items():
        mask = labels == value
        after = cleaned(mask, names)
        result[mask & ~after] = 0
        result[after & (result == 0)] = value
    return result


def choose(dice: Mapping[tuple[str, ...], Sequence[float]]) -> tuple[str, ...]:
    """The steps with the best mean Dice over the cases; the fewest where several are best."""
    means = {steps: float(np.mean(values)) for steps, values in dice.items()}
    best = max(means.values())
    return min((steps for steps, mean in means.items() if mean >= best - 1e-6), key=len)
