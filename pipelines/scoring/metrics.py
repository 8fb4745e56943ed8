"""Scores of one label in one case: Dice, NSD and HD95 in mm, with empty masks told apart; and intervals by bootstrap.

Rules for empty masks (kind of a case for a label): TP present in both, FP only predicted, FN only in the reference, TN
in neither. FP, FN: Dice 0, NSD 0, HD95 = the image diagonal in mm, flagged. TN: Dice 1, kept apart from the mean; NSD
and HD95 undefined (None). A surface is the cells of a mask with a face neighbour outside it, distances run between cell
centres in world coordinates (true spacing and shear), HD95 is the larger of the two directed 95th percentiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_erosion, find_objects, generate_binary_structure
from scipy.spatial import cKDTree

from medmamba.errors import GeometryError
from medmamba.grid import Grid

KINDS = ("TP", "FP", "FN", "TN")
TOLERANCE_MM = 2.0
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Score:
    """`dice` 0..1; `nsd` 0..1 and `hd95_mm` None where undefined; `flagged`: hd95_mm is the diagonal, not measured."""

    kind: str
    dice: float
    nsd: float | None
    hd95_mm: float | None
    flagged: bool
    voxels_reference: int
    voxels_prediction: int


def score(reference: np.ndarray, prediction: np.ndarray, grid: Grid, *, tolerance_mm: float = TOLERANCE_MM) -> Score:
    """Two masks (*space) bool on one `grid` in mm. Raises GeometryError when their shapes are not the grid's."""
    if reference.shape != grid.shape or prediction.shape != grid.shape:
        raise GeometryError(f"masks {reference.shape} and {prediction.shape} do not lie on the grid {grid.shape}")
    n, m = int(reference.sum()), int(prediction.sum())
    counts = {"voxels_reference": n, "voxels_prediction": m}
    if n == 0 and m == 0:
        return Score(kind="TN", dice=1.0, nsd=None, hd95_mm=None, flagged=False, **counts)
    if n == 0 or m == 0:
        kind = "FP" if n == 0 else "FN"
        return Score(kind=kind, dice=0.0, nsd=0.0, hd95_mm=diagonal(grid), flagged=True, **counts)
    there, back = surface_distances(reference, prediction, grid)
    near = int((there <= tolerance_mm).sum() + (back <= tolerance_mm).sum())
    return Score(
        kind="TP",
        dice=2.0 * int((reference & prediction).sum()) / (n + m),
        nsd=near / (there.size + back.size),
        hd95_mm=float(max(np.percentile(there, 95), np.percentile(back, 95))),
        flagged=False,
        **counts,
    )


def diagonal(grid: Grid) -> float:
    """Longest distance between two cell centres of the grid, in its unit: no Hausdorff distance on it is larger."""
    corners = grid.corners()
    return float(np.linalg.norm(corners[:, None] - corners[None], axis=-1).max())


def surface_distances(a: np.ndarray, b: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """For every surface cell of mask `a` the distance to the nearest of `b`, and the other way; neither mask empty."""
    points_a, points_b = surface(a, grid), surface(b, grid)
    return cKDTree(points_b).query(points_a)[0], cKDTree(points_a).query(points_b)[0]


def surface(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """World coordinates (M, n) of the cells of `mask` with a face neighbour outside it (outside the image counts)."""
    box = find_objects(mask.astype(np.uint8))[0]  # the mask is not empty
    inner = mask[box]
    edge = inner & ~binary_erosion(inner, generate_binary_structure(mask.ndim, 1))
    index = np.argwhere(edge) + [s.start for s in box]
    world: np.ndarray = index @ grid.affine[:-1, :-1].T + grid.affine[:-1, -1]
    return world


def interval(
    values: Sequence[float], groups: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % interval of the mean by the percentile bootstrap over whole groups (patients); None below two groups."""
    names = sorted(set(groups))
    if len(names) < 2:
        return None
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, group in zip(values, groups, strict=True):
        sums[place[group]] += value
        counts[place[group]] += 1
    drawn = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
