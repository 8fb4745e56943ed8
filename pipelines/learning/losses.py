"""The losses of segmentation: soft Dice over labels or regions and cross entropy, from sums over the whole batch.

The batch may lie on several processes: the sums are then taken over all of them, so that two processes learn what one
would with both halves. Letters: B batch, K classes, R regions. Truth for tests: MONAI's DiceCELoss, and its DiceLoss
with torch's binary cross entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.learning.parallel import sum_over_processes

IGNORED = -1  # the class of cells that nobody labelled: they enter no sum
SMOOTH = 1e-5  # MONAI's, in numerator and denominator


def dice_ce(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (B, K, *space) before the softmax, labels (B, 1, *space) int64 in IGNORED, 0..K-1 -> one number.

    1 - Dice, the mean over classes 1..K-1 with the batch as one, + cross entropy, the mean over cells.
    """
    target = labels[:, 0]
    valid = (target != IGNORED)[:, None]
    truth = F.one_hot(target.clamp(min=0), scores.shape[1]).movedim(-1, 1) * valid
    guess = scores.softmax(1) * valid
    entropy = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
    dice, mean_entropy = over_batch(guess, truth, entropy, valid.sum())
    return 1 - dice[1:].mean() + mean_entropy


def dice_bce(scores: Tensor, labels: Tensor, *, members: Tensor) -> Tensor:
    """Scores (B, R, *space) before the sigmoid, labels as in `dice_ce`, `members` (R, K) bool: whether a region holds a
    class -> one number: 1 - Dice, the mean over regions, + binary cross entropy, the mean over cells and regions."""
    target = labels[:, 0]
    valid = (target != IGNORED)[:, None]
    truth = members.to(scores.device)[:, target.clamp(min=0)].movedim(0, 1) * valid
    guess = scores.sigmoid() * valid
    entropy = (F.binary_cross_entropy_with_logits(scores, truth.to(scores.dtype), reduction="none") * valid).sum()
    dice, mean_entropy = over_batch(guess, truth, entropy, valid.sum() * scores.shape[1])
    return 1 - dice.mean() + mean_entropy


def over_batch(guess: Tensor, truth: Tensor, entropy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Dice (K,) of maps (B, K, *space), the batch of all processes as one, and `entropy` over `count` of them."""
    cells = (0, *range(2, guess.dim()))
    both, either = (guess * truth).sum(cells), guess.sum(cells) + truth.sum(cells)
    sums = sum_over_processes(torch.cat([both, either, entropy[None], count[None].to(entropy.dtype)]))
    both, either, (entropy, count) = *sums[:-2].chunk(2), sums[-2:]
    return (2 * both + SMOOTH) / (either + SMOOTH), entropy / count.clamp(min=1)
