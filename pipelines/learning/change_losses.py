"""Losses of change networks: cross entropy, Lovasz-softmax, similarity of the two dates, SeK; published sums of them.

Letters: B batch, K classes, P pixels. Scores are logits (B, K, H, W), labels whole numbers (B, H, W); in semantic
labels 0 stands for unchanged and is left out by cross entropy and Lovasz.
Definitions followed: Berman et al., "The Lovasz-Softmax loss" (2018); ChangeMamba (2024) and Mamba-FCS (2025) with
their released training scripts. Truth for tests: golden cases `mambafcs` (case_loss*).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.layers.change_pair import split_scores
from pipelines.learning.losses import IGNORED

TINY = 1e-6

# What the published scripts add up. SeK enters Mamba-FCS from the start on SECOND, after 150,000 steps on Landsat-SCD.
BINARY = {"ce_cd": 1.0, "lovasz_cd": 0.75}
MAMBASCD = {
    "ce_cd": 1.0,
    **{"ce_t1": 0.5, "ce_t2": 0.5, "similarity": 0.25},
    **{"lovasz_cd": 0.75, "lovasz_t1": 0.375, "lovasz_t2": 0.375},
}
MAMBAFCS = {
    "sek": 0.5,
    **{"ce_cd": 1.0, "ce_t1": 0.5, "ce_t2": 0.5, "similarity": 0.05},
    **{"lovasz_cd": 0.5, "lovasz_t1": 0.5, "lovasz_t2": 0.5},
}


class Triple(NamedTuple):
    """Scores or labels of one batch: whether there is change, and the classes at the earlier and the later date."""

    change: Tensor
    earlier: Tensor
    later: Tensor


def binary_change_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """ChangeMamba's loss of scores (B, 2, H, W) for labels (B, 1, H, W)."""
    return weighted(binary_change_terms(scores, labels[:, 0]), BINARY)


def semantic_change_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mamba-FCS' loss, its SeK made finite, of scores (B, 2 + 2K, H, W) for labels (B, 3, H, W) as `Triple` lists."""
    parts = Triple(*split_scores(scores)), Triple(*labels.unbind(1))
    return weighted(semantic_change_terms(*parts, sek=sek_loss), MAMBAFCS)


def binary_change_terms(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The terms of `BINARY` for scores (B, 2, H, W) and labels 0, 1 or IGNORED."""
    return {"ce_cd": cross_entropy(scores, labels), "lovasz_cd": lovasz_softmax(scores, labels)}


def semantic_change_terms(
    scores: Triple, labels: Triple, *, sek: Callable[[Triple, Triple], Tensor]
) -> dict[str, Tensor]:
    """The terms of `MAMBASCD` and `MAMBAFCS`; `sek` is `sek_loss` or `published_sek_loss`."""
    earlier, later = (label.long().masked_fill(label == 0, IGNORED) for label in labels[1:])
    return {
        **binary_change_terms(scores.change, labels.change),
        "ce_t1": cross_entropy(scores.earlier, earlier),
        "ce_t2": cross_entropy(scores.later, later),
        "lovasz_t1": lovasz_softmax(scores.earlier, earlier),
        "lovasz_t2": lovasz_softmax(scores.later, later),
        "similarity": similarity(scores.earlier, scores.later, unchanged=earlier == IGNORED),
        "sek": sek(scores, labels),
    }


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight * term over `weights`."""
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not ignored; 0 where all are."""
    total = F.cross_entropy(scores, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def lovasz_softmax(scores: Tensor, labels: Tensor) -> Tensor:
    """Lovasz extension of 1 - IoU, mean over the classes present, pixels of the whole batch together."""
    kept = labels != IGNORED
    probabilities, target = scores.softmax(dim=1).movedim(1, -1)[kept], labels[kept].long()
    losses = [_lovasz_class(probabilities[:, k], target == k) for k in target.unique()]
    return torch.stack(losses).mean() if losses else scores.sum() * 0.0


def _lovasz_class(probability: Tensor, inside: Tensor) -> Tensor:
    """One class: errors (P,) in falling order against the steps of the Jaccard loss."""
    errors, order = torch.sort((inside.to(probability.dtype) - probability).abs(), descending=True)
    truth = inside[order].to(probability.dtype)
    left = truth.sum() - truth.cumsum(0)
    jaccard = 1 - left / (truth.sum() + (1 - truth).cumsum(0))
    return errors @ torch.diff(jaccard, prepend=jaccard.new_zeros(1))


def similarity(earlier: Tensor, later: Tensor, *, unchanged: Tensor) -> Tensor:
    """Mean square of the difference of the two dates' probabilities, set to 0 where not `unchanged` (B, H, W)."""
    difference = earlier.softmax(dim=1) - later.softmax(dim=1)
    return (difference * unchanged[:, None]).square().mean()


def sek_loss(scores: Triple, labels: Triple, *, unchanged: int = 0, beta: float = 1.5, gamma: float = 0.5) -> Tensor:
    """The SeK loss over the classes present, kappa * exp(beta * IoU) clamped at 1e-6: always finite.

    0 without gradient where nothing changed.
    """

    def agreement(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        matrix, counts = soft_confusion(probabilities, target, unchanged)
        present = counts > 0
        overlaps = ious(matrix, matrix.sum(dim=1), counts, TINY)
        return kappa(matrix, TINY), (overlaps[present] * rarity(counts[present], TINY)).sum()

    found = _mean_over_dates(scores, labels, agreement)
    if found is None:
        return scores.earlier.new_zeros(())
    agreed, overlap = found
    separated = (agreed * torch.exp(beta * overlap)).clamp(min=TINY)
    return (-torch.log(separated) - gamma * torch.log(overlap + TINY)).clamp(min=0)


def published_sek_loss(
    scores: Triple,
    labels: Triple,
    *,
    unchanged: int = 0,
    beta: float = 1.5,
    gamma: float = 0.5,
    eps: float = 1e-7,
) -> Tensor:
    """The SeK loss as released: NaN where kappa is negative, and a class absent from the labels swamps the others.

    What is said of a changed pixel labelled `unchanged` (or as no class) counts in the unions, not in kappa.

    `eps` is 1e-7 at the first call of the released object and 1e-6 later. In float64, because an absent class weighs
    1 / log(1 + eps), which float32 rounds by a fifth. 0 without gradient where nothing changed.
    """

    def agreement(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        matrix, counts = soft_confusion(probabilities.double(), target, unchanged)
        said = probabilities.double().sum(dim=0)[kept_classes(probabilities, unchanged)]
        return kappa(matrix, eps), (ious(matrix, said, counts, eps) * rarity(counts, eps)).sum()

    found = _mean_over_dates(scores, labels, agreement)
    if found is None:
        return scores.earlier.new_zeros(())
    agreed, overlap = found
    loss = -torch.log(agreed * torch.exp(beta * overlap) + eps) - gamma * torch.log(overlap + TINY)
    return loss.clamp(min=0).to(scores.earlier.dtype)


def _mean_over_dates(
    scores: Triple, labels: Triple, agreement: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Kappa and weighted IoU of the changed pixels, the two dates' mean; None where no pixel changed."""
    changed = labels.change == 1
    if not changed.any():
        return None
    pairs = (scores.earlier, labels.earlier), (scores.later, labels.later)
    found = [agreement(s.softmax(dim=1).movedim(1, -1)[changed], label[changed].long()) for s, label in pairs]
    return (found[0][0] + found[1][0]) / 2, (found[0][1] + found[1][1]) / 2


def soft_confusion(probabilities: Tensor, target: Tensor, unchanged: int) -> tuple[Tensor, Tensor]:
    """(P, K) and labels (P,) -> (K-1, K-1), rows = prediction, and how many labels (K-1,): without `unchanged`."""
    kept = kept_classes(probabilities, unchanged)
    truth = (target[:, None] == target.new_tensor(kept)).to(probabilities.dtype)
    labelled = truth.any(dim=1)
    return probabilities[labelled][:, kept].mT @ truth[labelled], truth.sum(dim=0)


def kept_classes(probabilities: Tensor, unchanged: int) -> list[int]:
    """The classes of (P, K) without `unchanged`."""
    return [k for k in range(probabilities.shape[1]) if k != unchanged]


def kappa(matrix: Tensor, eps: float) -> Tensor:
    """Cohen's kappa of a soft confusion matrix."""
    total = matrix.sum()
    agreed = matrix.trace() / total
    by_chance = (matrix.sum(dim=1) * matrix.sum(dim=0)).sum() / total.square()
    return (agreed - by_chance) / (1 - by_chance + eps)


def ious(matrix: Tensor, said: Tensor, counts: Tensor, eps: float) -> Tensor:
    """Soft intersection over union (K-1,) of every class, `said` the sums of its probabilities."""
    both = matrix.diagonal()
    return both / (said + counts - both + eps)


def rarity(counts: Tensor, eps: float) -> Tensor:
    """Weights 1 / log(count + 1), sum 1."""
    weights = 1 / torch.log(counts + 1 + eps)
    return weights / weights.sum()
