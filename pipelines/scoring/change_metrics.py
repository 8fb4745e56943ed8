"""Scores of change maps as the field defines them, from confusion matrices that add over tiles; intervals by bootstrap.

Letters: M images, K classes (0 = unchanged), ... any leading axes of matrices. Matrices have rows = prediction, columns
= reference, whole numbers. Every figure comes from the matrix pooled over all images, class 1 = change, never from a
mean over images or over classes (`oa_images` alone is such a mean, because published tables print it).

Semantic maps are set to 0 where no change is predicted, then scored by one of two protocols that are not comparable:
`per_date` (SECOND's own, SCanNet, Mamba-FCS): both dates in one matrix of K classes; `from_to` (ChangeMamba's script):
the transition (from - 1) * (K - 1) + to as one of (K - 1)^2 + 1 classes, which is harsher. A figure never travels
without the name of its protocol. Undefined figures are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medmamba.errors import ConfigError, ShapeError
from pipelines.scoring.metrics import RESAMPLES

Figures = dict[str, np.ndarray]
Maps = tuple[np.ndarray, np.ndarray, np.ndarray]  # change, classes at the earlier date, classes at the later date


def confusion(
    prediction: np.ndarray, reference: np.ndarray, classes: int, valid: np.ndarray | None = None
) -> np.ndarray:
    """Counts (K, K) of two maps of one shape where `valid`. Raises ShapeError, ConfigError for a value outside."""
    if prediction.shape != reference.shape or (valid is not None and valid.shape != reference.shape):
        raise ShapeError(f"prediction {prediction.shape} and reference {reference.shape} (or valid) differ in shape")
    pairs = [np.asarray(a if valid is None else a[valid], dtype=np.int64).ravel() for a in (prediction, reference)]
    for name, values in zip(("prediction", "reference"), pairs):
        if values.size and (values.min() < 0 or values.max() >= classes):
            raise ConfigError(f"{name} holds {values.min()} to {values.max()}, expected 0 to {classes - 1}")
    return np.bincount(pairs[0] * classes + pairs[1], minlength=classes**2).reshape(classes, classes)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below == 0, np.nan, np.asarray(above, dtype=np.float64) / below)


def kappa(matrix: np.ndarray) -> np.ndarray:
    """Cohen's kappa (...,) of matrices (..., K, K); 0 for an empty one and where chance agrees wholly."""
    total = matrix.sum((-2, -1)).astype(np.float64)
    agreed = ratio(np.trace(matrix, axis1=-2, axis2=-1), total)
    chance = ratio((matrix.sum(-1, dtype=np.float64) * matrix.sum(-2)).sum(-1), total**2)
    return np.nan_to_num(ratio(agreed - chance, 1 - chance), nan=0.0)


def binary_figures(matrix: np.ndarray) -> Figures:
    """Precision, recall, F1 and IoU of change, OA and kappa, each (...,), from (..., 2, 2)."""
    missed, false, right = matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    f1, iou = ratio(2 * right, 2 * right + false + missed), ratio(right, right + false + missed)
    assert np.allclose(f1, 2 * iou / (1 + iou), rtol=0, atol=1e-12, equal_nan=True), "F1 = 2 IoU / (1 + IoU)"
    return {
        "precision": ratio(right, right + false),
        "recall": ratio(right, right + missed),
        "f1": f1,
        "iou": iou,
        "oa": overall_accuracy(matrix),
        "kappa": kappa(matrix),
    }


def semantic_figures(matrix: np.ndarray) -> Figures:
    """mIoU, SeK, F_scd, Score and what they are made of, each (...,), from (..., K, K).

    `miou` is the mean of unchanged and changed (which class does not matter); `kappa` leaves out the pixels rightly
    found unchanged; SeK = kappa * exp(IoU changed - 1); Score = 0.3 mIoU + 0.7 SeK.
    """
    unchanged = matrix[..., 0, 0]
    missed, false = matrix[..., 0, 1:].sum(-1), matrix[..., 1:, 0].sum(-1)
    found = matrix[..., 1:, 1:].sum((-2, -1))
    right = np.trace(matrix[..., 1:, 1:], axis1=-2, axis2=-1)
    iou_unchanged = ratio(unchanged, unchanged + missed + false)
    iou_changed = ratio(found, found + missed + false)
    without = matrix.copy()
    without[..., 0, 0] = 0
    miou, agreement = (iou_unchanged + iou_changed) / 2, kappa(without)
    sek = agreement * np.exp(iou_changed - 1)
    return {
        "oa": overall_accuracy(matrix),
        "miou": miou,
        "sek": sek,
        "f_scd": ratio(2 * right, 2 * found + missed + false),
        "kappa": agreement,
        "score": 0.3 * miou + 0.7 * sek,
        "precision": ratio(right, found + false),
        "recall": ratio(right, found + missed),
        "iou_unchanged": iou_unchanged,
        "iou_changed": iou_changed,
    }


def overall_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share (...,) of the pixels on the diagonal."""
    return ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


PROTOCOLS: dict[str, Callable[[np.ndarray], Figures]] = {
    "binary": binary_figures,
    "per_date": semantic_figures,
    "from_to": semantic_figures,
}


def from_to_codes(changed: np.ndarray, earlier: np.ndarray, later: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
    """Transition codes, 0 where not `changed`, and how many changed pixels were broken.

    Class 0 at the earlier date of a changed pixel makes the published code negative; such pixels count as unchanged.
    """
    codes = np.where(changed != 0, (earlier.astype(np.int64) - 1) * (classes - 1) + later, 0)
    return np.maximum(codes, 0), int((codes < 0).sum())


class ChangeTally:
    """Confusion matrices image by image, under one protocol of `PROTOCOLS`; tiles of an image may come in any order."""

    def __init__(self, protocol: str, classes: int = 2) -> None:
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {protocol!r} unknown; known: {', '.join(PROTOCOLS)}")
        self.protocol, self.classes = protocol, classes
        self.negative_codes = 0
        self._matrices: dict[str, np.ndarray] = {}
        self._groups: dict[str, str] = {}

    def add(self, image: str, counts: np.ndarray, *, group: str | None = None) -> None:
        """Counts (K, K) of a tile of `image`; images of one `group` (a scene) are drawn together by the bootstrap."""
        self._matrices[image] = self._matrices.get(image, 0) + counts
        self._groups[image] = image if group is None else group

    def add_binary(
        self,
        image: str,
        prediction: np.ndarray,
        reference: np.ndarray,
        *,
        valid: np.ndarray | None = None,
        group: str | None = None,
    ) -> None:
        """Maps (H, W), change where not 0; pixels outside `valid` do not count."""
        self.add(image, confusion(prediction != 0, reference != 0, 2, valid), group=group)

    def add_semantic(
        self,
        image: str,
        prediction: Maps,
        reference: Maps,
        *,
        valid: np.ndarray | None = None,
        group: str | None = None,
    ) -> None:
        """Change, classes at the earlier and at the later date, (H, W) each; pixels outside `valid` do not count."""
        if self.protocol == "from_to":
            codes, broken = from_to_codes(*prediction, self.classes)
            truth, _ = from_to_codes(*reference, self.classes)
            self.negative_codes += broken
            self.add(image, confusion(codes, truth, (self.classes - 1) ** 2 + 1, valid), group=group)
            return
        dates = [np.where(prediction[0] != 0, classes, 0) for classes in prediction[1:]]
        both = [confusion(found, true, self.classes, valid) for found, true in zip(dates, reference[1:])]
        self.add(image, both[0] + both[1], group=group)

    @property
    def images(self) -> list[str]:
        return sorted(self._matrices)

    @property
    def groups(self) -> list[str]:
        """Of every image, in the order of `images`."""
        return [self._groups[name] for name in self.images]

    @property
    def matrices(self) -> np.ndarray:
        """(M, K, K) in the order of `images`."""
        return np.stack([self._matrices[name] for name in self.images])

    def figures(self) -> dict[str, Any]:
        """All figures with the protocol's name, the number of images and, where published so, the mean OA of images."""
        told: dict[str, Any] = {
            name: plain(value) for name, value in PROTOCOLS[self.protocol](self.matrices.sum(0)).items()
        }
        told["oa_images"] = plain(np.nanmean(overall_accuracy(self.matrices)))
        told |= {"protocol": self.protocol, "images": len(self.images)}
        return told | ({"negative_codes": self.negative_codes} if self.protocol == "from_to" else {})

    def intervals(self, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, tuple[float, float] | None]:
        """95 % interval of every figure by the percentile bootstrap over whole groups; None below two groups."""
        drawn = self._resampled(draws(self.groups, seed, resamples))
        return {name: spread(values) for name, values in drawn.items()}

    def _resampled(self, weights: np.ndarray) -> Figures:
        """Figures (R,) of the matrices pooled with `weights` (R, M) of the images; counts are exact below 2**53."""
        matrices = self.matrices.astype(np.float64)
        pooled = weights @ matrices.reshape(len(matrices), -1)
        return PROTOCOLS[self.protocol](pooled.reshape(len(weights), *matrices.shape[1:]))


def paired_difference(
    first: ChangeTally, second: ChangeTally, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """first - second for every figure with its 95 % interval: both models scored on the same images of every draw.

    Raises ConfigError unless both were tallied on the same images, of the same sizes, under the same protocol.
    """
    same = first.images == second.images and first.groups == second.groups and first.protocol == second.protocol
    if not same or not np.array_equal(first.matrices.sum((1, 2)), second.matrices.sum((1, 2))):
        raise ConfigError("a paired comparison wants the same images, groups, pixels and protocol for both models")
    weights = draws(first.groups, seed, resamples)
    one, other = first.figures(), second.figures()
    drawn, against = first._resampled(weights), second._resampled(weights)
    return {
        name: {
            "difference": difference(one[name], other[name]),
            "interval": spread(values - against[name]),
            "protocol": first.protocol,
        }
        for name, values in drawn.items()
    }


def draws(groups: Sequence[str], seed: int, resamples: int) -> np.ndarray:
    """How often every image is drawn (R, M), whole groups with replacement; no row below two groups."""
    names = sorted(set(groups))
    if len(names) < 2:
        return np.zeros((0, len(groups)))
    picked = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    counts = np.stack([np.bincount(row, minlength=len(names)) for row in picked])
    return counts[:, [names.index(group) for group in groups]].astype(np.float64)


def spread(values: np.ndarray) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of what is defined; None without values."""
    defined = values[np.isfinite(values)]
    if not defined.size:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def plain(value: np.ndarray) -> float | None:
    """A JSON number; None where undefined."""
    return float(value) if np.isfinite(value) else None


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
