"""The Swin transformer stage: attention in windows with relative positions, every second block shifted by half one.

Letters in this file: B batch, G windows, L positions of a window, C channels. Maps are channels-last, (B, h, w, C).
Definition followed: Liu et al., "Swin Transformer" (2021). Maps that windows do not tile are padded after the norm and
the padding is hidden. Truth for tests: golden case attswinunet.
"""

import torch
from torch import Tensor, nn

from medmamba.layers.attention import SelfAttention, TokenMlp
from medmamba.layers.groups import contiguous, cut_ends, multiple_of, pad_ends, padded_positions

HIDDEN_KEY = -100.0  # added to the scores of keys from another region, as published


def relative_positions(side: int) -> Tensor:
    """(L, L): for every pair of positions of a side x side window the row of its offset in the bias table."""
    axis = torch.arange(side)
    rows, columns = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))
    down, right = (part[:, None] - part[None] + side - 1 for part in (rows, columns))
    return down * (2 * side - 1) + right


class WindowAttention(SelfAttention):
    """(B, G, L, C) -> the same; `bias` (G, 1, L, L) is added to the learned relative bias."""

    relative: Tensor

    def __init__(self, width: int, heads: int, side: int, *, qkv_bias: bool = True) -> None:
        super().__init__(width, heads, qkv_bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative", relative_positions(side), persistent=False)

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        learned = self.relative_position_bias_table[self.relative].movedim(-1, 0)
        return super().forward(tokens, learned if bias is None else learned + bias)


def region_bias(space: tuple[int, int], sides: tuple[int, int], window: int, shift: int, like: Tensor) -> Tensor | None:
    """(G, 1, L, L): hidden where two positions of a window come from different ends of the map or one is padding."""
    if shift == 0 and space == sides:
        return None
    region = padded_positions(space, sides, like.device).long()
    region = region.roll((-shift, -shift), (1, 2))
    for axis, length in enumerate(sides):
        place = torch.arange(length, device=like.device)
        part = (place >= length - window).long() + (place >= length - shift).long() if shift else 0 * place
        region = 3 * region + part.reshape([-1 if i == axis + 1 else 1 for i in range(4)])
    labels = contiguous(sides, (window, window)).split(region).squeeze(-1)
    differ = labels[0, :, :, None] != labels[0, :, None, :]
    return differ.to(like.dtype)[:, None] * HIDDEN_KEY


class SwinBlock(nn.Module):
    """x + attention in windows, x + perceptron, on a map (B, h, w, C); a map within one window is not shifted."""

    def __init__(
        self, width: int, heads: int, window: int, shift: int, mlp_ratio: float, *, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attend(self, x: Tensor) -> Tensor:
        space = (x.shape[1], x.shape[2])
        shift = self.shift if min(space) > self.window else 0
        sides = (multiple_of(space[0], self.window), multiple_of(space[1], self.window))
        windows = contiguous(sides, (self.window, self.window))
        moved = pad_ends(x, sides).roll((-shift, -shift), (1, 2))
        bias = region_bias(space, sides, self.window, shift, x)
        mixed = windows.join(self.attn(windows.split(moved), bias))
        return cut_ends(mixed.roll((shift, shift), (1, 2)), space)


class SwinStage(nn.Module):
    """Blocks, shifted in turn; `down` or `up` (one of them) leads on. `side_px` is the shorter side it is made for."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        window: int,
        side_px: int,
        mlp_ratio: float,
        qkv_bias: bool = True,
        down: nn.Module | None = None,
        up: nn.Module | None = None,
    ) -> None:
        super().__init__()
        fitted = min(window, side_px)
        half = window // 2 if side_px > window else 0
        self.blocks = nn.Sequential(
            *(SwinBlock(width, heads, fitted, half * (i % 2), mlp_ratio, qkv_bias=qkv_bias) for i in range(depth))
        )
        self.downsample = down
        self.upsample = up

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        for onward in (self.downsample, self.upsample):
            x = x if onward is None else onward(x)
        return x
