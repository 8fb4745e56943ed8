"""Scores against brute force, MONAI and the table of empty masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medmamba.errors import GeometryError
from medmamba.grid import RAS, Grid
from pipelines.scoring.metrics import diagonal, interval, score, surface

SHAPE = (3, 4, 5)
SHEARED = Grid(SHAPE, np.array([[0, 0, 2.0, 5], [0, 1.5, 0.4, 1], [3.0, 0.5, 0, -7], [0, 0, 0, 1]]), RAS)
PLAIN = Grid(SHAPE, np.array([[0, 0, 2.0, 5], [0, 1.5, 0, 1], [3.0, 0, 0, -7], [0, 0, 0, 1]]), RAS)
masks = arrays(bool, SHAPE, elements=st.booleans(), fill=st.nothing())


def brute_surface(mask: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """World positions of cells with a neighbour outside, by looking at every cell and neighbour."""
    found = []
    for cell in np.argwhere(mask):
        for axis in range(mask.ndim):
            for side in (-1, 1):
                other = cell.copy()
                other[axis] += side
                outside = not 0 <= other[axis] < mask.shape[axis]
                if outside or not mask[tuple(other)]:
                    found.append(grid.affine[:3, :3] @ cell + grid.affine[:3, 3])
                    break
            else:
                continue
            break
    return found


@given(masks, masks)
def test_scores_equal_brute_force_on_a_sheared_grid(a: np.ndarray, b: np.ndarray) -> None:
    if not a.any() or not b.any():
        return
    result = score(a, b, SHEARED, tolerance_mm=2.1)
    points_a, points_b = np.array(brute_surface(a, SHEARED)), np.array(brute_surface(b, SHEARED))
    table = np.linalg.norm(points_a[:, None] - points_b[None], axis=-1)
    there, back = table.min(1), table.min(0)
    assert result.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert result.nsd == pytest.approx(np.mean(np.concatenate([there, back]) <= 2.1))
    assert result.dice == pytest.approx(2 * np.sum(a & b) / (a.sum() + b.sum()))
    assert result.hd95_mm is not None
    assert result.hd95_mm <= diagonal(SHEARED)


@given(masks, masks)
def test_scores_are_symmetric(a: np.ndarray, b: np.ndarray) -> None:
    one, other = score(a, b, PLAIN), score(b, a, PLAIN)
    assert (one.dice, one.nsd, one.hd95_mm) == (other.dice, other.nsd, other.hd95_mm)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calling itself
@pytest.mark.parametrize("seed", range(5))
def test_monai_says_the_same_with_true_spacing(seed: int) -> None:
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    rng = np.random.default_rng(seed)
    a, b = rng.random((2, *SHAPE)) < 0.4
    two = [torch.from_numpy(np.stack([~m, m])[None]) for m in (a, b)]
    spacing = list(PLAIN.spacing)
    hd95 = compute_hausdorff_distance(*two, percentile=95, spacing=spacing).item()
    nsd = compute_surface_dice(*two, class_thresholds=[2.1], spacing=spacing).item()
    result = score(b, a, PLAIN, tolerance_mm=2.1)
    assert result.hd95_mm == pytest.approx(hd95, rel=1e-6)
    assert result.nsd == pytest.approx(nsd, rel=1e-6)


def test_empty_masks_follow_the_rules() -> None:
    none, some = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
    some[1, 1, 1] = True
    length = np.linalg.norm([2 * 3.0, 3 * 1.5, 4 * 2.0])  # (cells - 1) * mm per axis
    both = score(none, none, PLAIN)
    assert (both.kind, both.dice, both.nsd, both.hd95_mm, both.flagged) == ("TN", 1.0, None, None, False)
    for kind, reference, prediction in (("FP", none, some), ("FN", some, none)):
        result = score(reference, prediction, PLAIN)
        assert (result.kind, result.dice, result.nsd, result.flagged) == (kind, 0.0, 0.0, True)
        assert result.hd95_mm == pytest.approx(length)
    same = score(some, some, PLAIN)
    assert (same.kind, same.dice, same.nsd, same.hd95_mm, same.flagged) == ("TP", 1.0, 1.0, 0.0, False)


def test_hd95_takes_the_spacing() -> None:
    a, b = np.zeros((2, *SHAPE), dtype=bool)
    a[0, 0, 0] = b[2, 0, 0] = True
    assert score(a, b, PLAIN).hd95_mm == pytest.approx(6.0)  # two steps of 3 mm
    assert surface(a, PLAIN).tolist() == [[5.0, 1.0, -7.0]]  # the affine's own origin


def test_masks_must_lie_on_the_grid() -> None:
    with pytest.raises(GeometryError, match=r"\(3, 4, 4\)"):
        score(np.zeros((3, 4, 4), dtype=bool), np.zeros(SHAPE, dtype=bool), PLAIN)


def test_interval_is_seeded_covers_the_mean_and_needs_two_groups() -> None:
    values, groups = [0.2, 0.4, 0.9, 0.7], ["a", "b", "c", "d"]
    bounds = interval(values, groups, seed=1)
    assert bounds == interval(values, groups, seed=1)
    assert bounds is not None
    assert bounds[0] < np.mean(values) < bounds[1]
    assert interval(values, ["a"] * 4) is None
    assert interval([0.5, 0.5, 0.5], ["a", "b", "c"]) == (0.5, 0.5)


def test_interval_resamples_patients_not_cases() -> None:
    """Fifty equal cases of one patient tell no more than one: the interval must stay as wide as with two cases."""
    two = interval([0.0, 1.0], ["a", "b"])
    many = interval([0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50)
    assert two == many == (0.0, 1.0)
