"""What is done to a finished label map, label by label, where it scored better on held-out cases: `CLEANING`.

Whole-case steps, so they come after the last slab. Connected components with 26 neighbours (cc3d), holes with 6
(fill_voids), as nnU-Net's and TotalSegmentator's users know them. A step works inside the mask it is given, so that
components (4 to 5 bytes a cell) stand beside one mask and the labels, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.ndimage import find_objects

Mask = np.ndarray  # (*space) bool


def largest_component(mask: Mask) -> Mask:
    """The largest connected part of a mask that is not empty; in place."""
    import cc3d

    cells = np.ascontiguousarray(mask).view(np.uint8)  # of a thin bool array cc3d 4.1 expects too few components
    parts = cc3d.connected_components(cells, connectivity=26 if mask.ndim == 3 else 8)
    sizes = np.zeros(int(parts.max()) + 1, np.int64)
    for plane in parts:  # an index of 8 bytes a cell never stands whole
        found = np.bincount(plane.ravel())
        sizes[: len(found)] += found
    largest = 1 + sizes[1:].argmax()
    for kept, plane in zip(mask, parts, strict=True):
        kept[:] = plane == largest
    return mask


def fill_holes(mask: Mask) -> Mask:
    """The mask with every hole filled that does not reach the border of the image; in place."""
    import fill_voids

    filled: Mask = fill_voids.fill(np.ascontiguousarray(mask), in_place=True)
    return filled


CLEANING: dict[str, Callable[[Mask], Mask]] = {"largest_component": largest_component, "fill_holes": fill_holes}
CHOICES: tuple[tuple[str, ...], ...] = tuple(c for n in range(len(CLEANING) + 1) for c in combinations(CLEANING, n))


def cleaned(mask: Mask, steps: Iterable[str]) -> Mask:
    """The mask after the named steps, in place; an empty one stays as it is."""
    for step in steps if mask.any() else ():
        mask = CLEANING[step](mask)
    return mask


def clean(labels: np.ndarray, steps: Mapping[int, Sequence[str]]) -> np.ndarray:
    """Labels (*space) with the steps of each value done, in place. Cells that a value loses become 0; holes are filled
    only where no other label lies."""
    boxes = find_objects(labels)  # no step reaches out of a label's box
    for value, names in steps.items():
        if value > len(boxes) or boxes[value - 1] is None:
            continue
        part = labels[boxes[value - 1]]
        after = cleaned(part == value, names)
        for plane, kept in zip(part, after, strict=True):
            plane[(plane == value) & ~kept] = 0
            plane[kept & (plane == 0)] = value
    return labels


def pieces(labels: np.ndarray) -> dict[int, int]:
    """Value -> number of its connected parts, for every value above 0; all values in one pass, 4 bytes a cell."""
    import cc3d

    parts = cc3d.connected_components(np.ascontiguousarray(labels), connectivity=26 if labels.ndim == 3 else 8)
    value_of = np.zeros(int(parts.max(initial=0)) + 1, labels.dtype)
    for plane, found in zip(labels, parts, strict=True):
        value_of[found] = plane
    values, counts = np.unique(value_of[1:], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def trial(
    found: np.ndarray, truth: np.ndarray, values: Iterable[int], ignore: int | None = None
) -> dict[int, dict[tuple[str, ...], float]]:
    """Dice of each value in one case (arrays (*space)) after each of CHOICES; values that neither side has are left
    out. Cells where the truth is `ignore` are not counted."""
    boxes = find_objects(found)
    sizes = dict(zip(*(part.tolist() for part in np.unique(truth, return_counts=True)), strict=True))
    result: dict[int, dict[tuple[str, ...], float]] = {}
    for value in values:
        box = boxes[value - 1] if value <= len(boxes) else None
        if box is None:
            if sizes.get(value):
                result[value] = dict.fromkeys(CHOICES, 0.0)
            continue
        mask, wanted = found[box] == value, truth[box] == value
        may = (mask | (found[box] == 0)) & (truth[box] != ignore if ignore is not None else True)
        after = {steps: cleaned(mask.copy(), steps) & may for steps in CHOICES}
        size = sizes.get(value, 0)
        dice = {s: 2 * int((m & wanted).sum()) / max(1, int(m.sum()) + size) for s, m in after.items()}
        if size or after[()].any():
            result[value] = dice
    return result


def choose(dice: Mapping[tuple[str, ...], Sequence[float]]) -> tuple[str, ...]:
    """The steps with the best mean Dice over the cases; the fewest where several are best."""
    means = {steps: float(np.mean(values)) for steps, values in dice.items()}
    best = max(means.values())
    return min((steps for steps, mean in means.items() if mean >= best - 1e-6), key=len)
