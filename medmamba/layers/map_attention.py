"""Attention over the whole map: every position with every other (PAM), every channel with every other (CAM).

Letters in this file: B batch, C channels, L positions of a map of any rank in row-major order.
Definition followed: Fu et al., "Dual Attention Network for Scene Segmentation" (2019). Truth: golden case daf.
"""

import torch
from torch import Tensor, nn

from medmamba.layers.nd import CONV, check_rank


class PositionAttention(nn.Module):
    """x (B, C, *space) + gamma * attention over its L positions; gamma starts at 0, nothing is scaled. L^2 memory."""

    def __init__(self, width: int, *, rank: int = 2, bias: bool = True) -> None:
        super().__init__()
        conv, narrow = CONV[check_rank(rank)], max(width // 8, 1)
        self.query_conv = conv(width, narrow, 1, bias=bias)
        self.key_conv = conv(width, narrow, 1, bias=bias)
        self.value_conv = conv(width, width, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weights = (queries.mT @ keys).softmax(dim=-1)
        return self.gamma * (values @ weights.mT).reshape(x.shape) + x


class ChannelAttention(nn.Module):
    """x (B, C, *space) + gamma * attention over its C channels; unlike channels attract each other, as published."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        energy = flat @ flat.mT
        weights = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1)
        return self.gamma * (weights @ flat).reshape(x.shape) + x
