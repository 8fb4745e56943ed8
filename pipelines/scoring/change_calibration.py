"""How far a confidence of change can be believed: reliability, calibration and the threshold, from counts that add.

Letters: N bins of equal width over confidence 0..1. Held-out images only; the threshold and the curve belong into the
bundle's task settings.
Definitions followed: Guo et al., "On Calibration of Modern Neural Networks" (2017), expected calibration error;
Zadrozny and Elkan (2002), calibration by isotonic regression (pool adjacent violators).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from medmamba.errors import ConfigError, ShapeError

BINS = 256  # those of a byte band


class ConfidenceTally:
    """Pixels, changed pixels and sum of confidence in each of N bins; tiles and images may come in any order."""

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2:
            raise ConfigError(f"bins={bins}: a reliability diagram wants 2 or more")
        self.pixels = np.zeros(bins, dtype=np.int64)
        self.changed = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)

    def add(self, confidence: np.ndarray, reference: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Confidence of change (H, W) in 0..1 and the reference, change where not 0, where `valid`.

        Raises ShapeError, and ConfigError for a confidence outside 0..1.
        """
        if confidence.shape != reference.shape or (valid is not None and valid.shape != reference.shape):
            raise ShapeError(
                f"confidence {confidence.shape} and reference {reference.shape} (or valid) differ in shape"
            )
        kept, truth = (a.ravel() if valid is None else a[valid] for a in (confidence, reference != 0))
        if kept.size and not (kept.min() >= 0 and kept.max() <= 1):
            raise ConfigError(f"confidence from {kept.min()} to {kept.max()}, expected 0 to 1 (after the softmax)")
        count = len(self.pixels)
        places = np.minimum((kept * count).astype(np.int64), count - 1)
        self.pixels += np.bincount(places, minlength=count)
        self.changed += np.bincount(places[truth], minlength=count)
        self.confidence += np.bincount(places, weights=kept.astype(np.float64), minlength=count)

    def reliability(self, rows: int = 10) -> list[dict[str, Any]]:
        """The diagram: `rows` ranges of confidence with pixels, mean confidence and the share that changed."""
        edges = np.linspace(0, len(self.pixels), rows + 1).round().astype(int)
        told = []
        for first, last in pairwise(edges.tolist()):
            pixels = int(self.pixels[first:last].sum())
            told.append(
                {
                    "from": first / len(self.pixels),
                    "to": last / len(self.pixels),
                    "pixels": pixels,
                    "confidence": float(self.confidence[first:last].sum() / pixels) if pixels else None,
                    "changed": float(self.changed[first:last].sum() / pixels) if pixels else None,
                }
            )
        return told

    def calibration_error(self) -> float | None:
        """Mean gap between confidence and the share that changed over the bins, weighed by pixels; None when empty."""
        total = self.pixels.sum()
        return float(np.abs(self.confidence - self.changed).sum() / total) if total else None

    def threshold(self) -> tuple[float, float]:
        """The bin edge from which up "change" gives the highest F1, and that F1; the middle-most of equals.

        Raises ConfigError when no pixel changed: nothing can be chosen.
        """
        positives = int(self.changed.sum())
        if positives == 0:
            raise ConfigError("no changed pixel in the held-out images: a threshold cannot be chosen on them")
        right = np.cumsum(self.changed[::-1])[::-1]
        named = np.cumsum(self.pixels[::-1])[::-1]
        f1 = 2 * right / (named + positives)
        best = np.flatnonzero(f1 == f1.max())
        edge = best[np.argmin(np.abs(best - len(f1) / 2))]
        return float(edge / len(f1)), float(f1[edge])

    def curve(self) -> np.ndarray:
        """Calibrated confidence (N,) of every bin, never falling; empty bins lie between their neighbours."""
        seen = np.flatnonzero(self.pixels)
        if not seen.size:
            raise ConfigError("no pixel was tallied: there is nothing to calibrate on")
        values = pool_adjacent(self.changed[seen] / self.pixels[seen], self.pixels[seen].astype(np.float64))
        return np.interp(np.arange(len(self.pixels)), seen, values)


def calibrate(confidence: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Confidence 0..1 of any shape through the curve of a `ConfidenceTally`."""
    places = np.minimum((confidence * len(curve)).astype(np.int64), len(curve) - 1)
    calibrated: np.ndarray = curve[places]
    return calibrated


def pool_adjacent(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The never falling sequence nearest to `values` in weighted least squares."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist()):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            last, before = blocks.pop(), blocks.pop()
            total = last[1] + before[1]
            blocks.append([(last[0] * last[1] + before[0] * before[1]) / total, total, last[2] + before[2]])
    return np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])
