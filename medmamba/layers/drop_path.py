"""Stochastic depth: a whole branch is left out for some samples of a batch while training."""

from torch import Tensor, nn


def drop_rates(highest: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, rising evenly from 0 to `highest`."""
    return [highest * number / max(depth - 1, 1) for number in range(depth)]


class DropPath(nn.Module):
    """Zero a sample's branch with probability `rate` in training and scale the rest by 1 / (1 - rate).

    Definition followed: Huang et al., "Deep Networks with Stochastic Depth" (2016). In evaluation: identity.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        shape = (len(branch), *(1,) * (branch.ndim - 1))
        return branch * branch.new_empty(shape).bernoulli_(1 - self.rate) / (1 - self.rate)
