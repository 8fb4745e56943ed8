"""Softmax attention of tokens among themselves, and the two-layer perceptron that follows it.

Letters in this file: B batch (any leading axes), L tokens, C channels.
Definition followed: Vaswani et al., "Attention Is All You Need" (2017).
Truth for tests: golden cases paratranscnn, attswinunet, dformer.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError


class SelfAttention(nn.Module):
    """(B, L, C) -> (B, L, C); `bias` (broadcast to (B, heads, L, L)) is added before the softmax."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"{width} channels do not fall into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        queries, keys, values = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        out: Tensor = self.proj(mixed.transpose(-2, -3).flatten(-2))
        return out


class TokenMlp(nn.Module):
    """fc1, exact GELU, fc2 over the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out
