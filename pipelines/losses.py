"""The loss of segmentation: soft Dice over the labels and cross entropy, from sums over the whole batch.

The batch may lie on several processes: the sums are then taken over all of them, so that two processes learn what one
would with both halves. Letters: B batch, K classes. Truth for tests: MONAI's DiceCELoss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.parallel import sum_over_processes

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
    cells = (0, *range(2, scores.dim()))
    entropy = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
    both, either = (guess * truth).sum(cells), guess.sum(cells) + truth.sum(cells)
    sums = sum_over_processes(torch.cat([both, either, entropy[None], valid.sum()[None].to(entropy.dtype)]))
    both, either, (entropy, count) = *sums[:-2].chunk(2), sums[-2:]
    dice = (2 * both + SMOOTH) / (either + SMOOTH)
    return 1 - dice[1:].mean() + entropy / count.clamp(min=1)
