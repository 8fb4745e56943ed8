"""Squeeze and excitation: channels weighed by what the whole map holds.

Definition followed: Hu et al., "Squeeze-and-Excitation Networks" (2018).
"""

import warnings

from torch import Tensor, nn


def maybe_empty_linear(channels: int, out: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer; either width may be 0, where a squeeze of narrow maps leaves nothing but the biases behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of empty tensors
        return nn.Linear(channels, out, bias)


class SqueezeExcite(nn.Module):
    """Each channel of (B, C, H, W) times a sigmoid made from the means of all; C / `reduction` in between."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.excitation = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.excitation(x.mean(dim=(2, 3)))
        return x * weights[..., None, None]
