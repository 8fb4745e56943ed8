"""What the demo's network has to beat: tissues by two intensity thresholds, fitted on the training cases.

An image is divided by the mean of its brain (above Otsu's threshold); grey matter lies between the two thresholds,
white matter above the upper one. They are those with the largest mean Dice over the training cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from skimage.filters import threshold_otsu

from medmamba.formats.nifti import NiftiSource, read_labels, write_labels
from medmamba.source import read_all
from pipelines.cases.cohort import LabelledCase
from pipelines.demo.cohort import TISSUES

LEVELS = np.arange(0.30, 1.50, 0.02)  # candidates, in units of the brain's mean


def fit_thresholds(cases: Sequence[LabelledCase]) -> tuple[float, float]:
    """The pair (lower, upper) with the largest Dice, averaged over cases and both tissues."""
    scores = np.zeros((len(LEVELS), len(LEVELS)))
    for case in cases:
        values = relative_values(next(iter(case.case.files.values())))
        labels, _ = read_labels(case.label)
        above = {tissue: _counts(values[labels == tissue]) for tissue in TISSUES}
        everything = _counts(values)
        grey, white = (int((labels == tissue).sum()) for tissue in TISSUES)
        inside = above[1][:, None] - above[1][None, :]  # grey matter between lower (rows) and upper (columns)
        found = (everything[:, None] - everything[None, :]).clip(min=0)  # below the diagonal there is none
        scores += 2 * inside / (found + grey) + (2 * above[2] / (everything + white))[None, :]
    scores[np.tril_indices(len(LEVELS))] = -np.inf  # lower < upper
    low, high = np.unravel_index(scores.argmax(), scores.shape)
    return float(LEVELS[low]), float(LEVELS[high])


def write_thresholded(
    cases: Sequence[LabelledCase],
    thresholds: tuple[float, float],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`<case>_dseg.nii.gz` of every case by the thresholds (lower, upper)."""
    for number, case in enumerate(cases, start=1):
        path = next(iter(case.case.files.values()))
        labels = np.digitize(relative_values(path), thresholds).astype(np.int32)
        write_labels(folder / f"{case.case.id}_dseg.nii.gz", labels, NiftiSource(path), names=TISSUES)
        if progress:
            progress(number, len(cases))


def relative_values(path: Path) -> np.ndarray:
    """The image (z, y, x) divided by the mean of what Otsu's threshold calls brain."""
    values = read_all(NiftiSource(path)).array[0].astype(np.float64)
    return values / values[values > threshold_otsu(values)].mean()


def _counts(values: np.ndarray) -> np.ndarray:
    """How many values lie at or above each of LEVELS, (levels,)."""
    return values.size - np.searchsorted(np.sort(values.ravel()), LEVELS, side="left")
