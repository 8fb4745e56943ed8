"""Networks wearing networks: the mean of folds, of mirrorings, and how far the members of an ensemble disagree.

The disagreement of a cell is H(mean of p) - mean of H(p) in bits, over every fold and every mirroring: the mutual
information between the label and the member, 0 where all say the same, however unsure each is (Depeweg et al., ICML
2018, "Decomposition of uncertainty in Bayesian deep learning"; BALD of Houlsby et al., 2011). It is cut at 1 bit.

Letters: F folds, B batch, C channels, K classes or regions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What scores are: `mean` of (F, B, K, *space) as scores, `probability` of (B, K, *space), and its `entropy` in
    bits (B, 1, *space)."""

    mean: Callable[[Tensor], Tensor]
    probability: Callable[[Tensor], Tensor]
    entropy: Callable[[Tensor], Tensor]


def softmax_mean(parts: Tensor) -> Tensor:
    """The log of the mean probability."""
    return torch.logsumexp(parts.log_softmax(2), 0) - math.log(len(parts))


def sigmoid_mean(parts: Tensor) -> Tensor:
    """The logit of the mean probability: above 0 where it is above a half."""
    return torch.logsumexp(F.logsigmoid(parts), 0) - torch.logsumexp(F.logsigmoid(-parts), 0)


def softmax_entropy(p: Tensor) -> Tensor:
    """Of one label a cell."""
    return torch.special.entr(p).sum(1, keepdim=True) / math.log(2)


def sigmoid_entropy(p: Tensor) -> Tensor:
    """The mean over regions that are there or not."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(1, keepdim=True) / math.log(2)


OUTPUTS = {
    "softmax": Outputs(mean=softmax_mean, probability=lambda x: x.softmax(1), entropy=softmax_entropy),
    "sigmoid": Outputs(mean=sigmoid_mean, probability=torch.sigmoid, entropy=sigmoid_entropy),
}


class MeanOfFolds(nn.Module):
    """The mean of the folds' probabilities, as scores; a single fold as it is."""

    def __init__(self, folds: Sequence[nn.Module], outputs: Outputs = OUTPUTS["softmax"]) -> None:
        super().__init__()
        self.folds, self.outputs = nn.ModuleList(folds), outputs

    def parts(self, x: Tensor) -> list[Tensor]:
        """Scores (B, K, *space) of every fold."""
        return [fold(x).float() for fold in self.folds]

    def mean(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else self.outputs.mean(torch.stack(parts))

    def combined(self, parts: list[Tensor]) -> Tensor:
        """What is said of the folds' scores, cell by cell."""
        return self.mean(parts)

    def combined_channels(self, classes: int) -> int:
        """How many channels `combined` has."""
        return classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> (B, K, *space)."""
        return self.combined(self.parts(x))


class Moments(MeanOfFolds):
    """Scores as `MeanOfFolds`, then what a mean over mirrorings may be taken of: probabilities and entropy;
    (B, C, *space) -> (B, 2K + 1, *space)."""

    def combined_channels(self, classes: int) -> int:
        return 2 * classes + 1

    def combined(self, parts: list[Tensor]) -> Tensor:
        members = [self.outputs.probability(part) for part in parts]
        entropy = torch.stack([self.outputs.entropy(p) for p in members]).mean(0)
        return torch.cat([self.mean(parts), torch.stack(members).mean(0), entropy], 1)


class Mirrored(nn.Module):
    """The mean of a network's scores over every mirroring of the spatial `axes` (test-time augmentation), one after
    another, so that only two maps of scores stand at once."""

    def __init__(self, network: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.flips = [flip for n in range(len(axes) + 1) for flip in combinations([a + 2 for a in axes], n)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> (B, K, *space)."""
        total: Tensor = self.network(x)
        for flip in self.flips[1:]:
            total = total + self.network(x.flip(flip)).flip(flip)
        return total / len(self.flips)


class Disagreement(nn.Module):
    """A network wearing one that gives `Moments`: the same scores, and the disagreement of its members after them."""

    def __init__(self, network: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> (B, K + 1, *space), the last one in 0..1 bit."""
        return self.told(self.network(x))

    def told(self, found: Tensor) -> Tensor:
        """The same of `Moments`, cell by cell."""
        classes = found.shape[1] // 2
        scores, p, entropy = found.split([classes, classes, 1], 1)
        return torch.cat([scores, (self.outputs.entropy(p) - entropy).clamp(0, 1)], 1)
