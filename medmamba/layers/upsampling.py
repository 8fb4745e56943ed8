"""Ways from a coarse map to the size of a finer one in a U-Net's decoder; any rank: `UPSAMPLINGS[name](...)`.

Letters in this file: B batch, G windows, Q and K positions of a fine and a coarse window. All are made from the widths
of the two maps and the stride between them, and called with the coarse map and the skip.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ShapeError
from medmamba.layers.groups import contiguous, cut_ends, multiple_of, pad_ends, padded_positions
from medmamba.layers.nd import CONV, channels_first, channels_last, upsample_to

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
HEADS = 4


class NearestUpsampling(nn.Module):
    """Nearest up-sampling and a pointwise convolution; the result is cropped to the skip's size."""

    def __init__(self, inner: int, outer: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CONV[len(stride)](inner, outer, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv(upsample_to(x, self.stride, tuple(skip.shape[2:])))
        return out


class WindowUpsampling(nn.Module):
    """Linear up-sampling of the coarse map plus attention: pixels of the skip ask the coarse cells of their window.

    From the note, no public case: "More than Encoder: Introducing Transformer Decoder to Upsample" (Li et al., 2022).
    Known from its abstracts: the result is the attention decoder's output plus bilinear up-sampling, queries are the
    skip's pixels, keys and values the coarse features, attention stays in local windows. Chosen here: windows of 4
    coarse cells a side, up to 4 heads, layer norms before the projections, a pointwise convolution in the linear way.
    """

    def __init__(self, inner: int, outer: int, stride: tuple[int, ...], *, side: int = 4) -> None:
        super().__init__()
        self.stride, self.side = stride, side
        self.heads = math.gcd(outer, HEADS)
        self.conv = CONV[len(stride)](inner, outer, 1)
        self.norm_skip = nn.LayerNorm(outer)
        self.norm_coarse = nn.LayerNorm(inner)
        self.query = nn.Linear(outer, outer)
        self.key_value = nn.Linear(inner, 2 * outer)
        self.proj = nn.Linear(outer, outer)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if any(fine > n * step for fine, n, step in zip(skip.shape[2:], x.shape[2:], self.stride, strict=True)):
            raise ShapeError(f"skip {tuple(skip.shape)} is larger than {tuple(x.shape)} by more than {self.stride}")
        near: Tensor = F.interpolate(self.conv(x), skip.shape[2:], mode=LINEAR[len(self.stride)], align_corners=False)
        return near + channels_first(self.attend(channels_last(x), channels_last(skip)))

    def attend(self, x: Tensor, skip: Tensor) -> Tensor:
        """Channels-last maps (B, *space, C) -> (B, *space of the skip, outer)."""
        space, fine = x.shape[1:-1], skip.shape[1:-1]
        sides = [multiple_of(n, self.side) for n in space]
        reach = [n * step for n, step in zip(sides, self.stride)]
        cells = contiguous(sides, (self.side,) * len(sides))
        pixels = contiguous(reach, [self.side * step for step in self.stride])
        queries = self.split_heads(pixels.split(pad_ends(self.query(self.norm_skip(skip)), reach)))
        keys, values = map(
            self.split_heads, cells.split(pad_ends(self.key_value(self.norm_coarse(x)), sides)).chunk(2, dim=-1)
        )
        real = ~cells.split(padded_positions(space, sides, x.device)).squeeze(-1)  # (1, G, K)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=real[:, :, None, None])
        out: Tensor = self.proj(cut_ends(pixels.join(mixed.transpose(-2, -3).flatten(-2)), fine))
        return out

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, G, L, C) -> (B, G, heads, L, C / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


UPSAMPLINGS: dict[str, Callable[[int, int, tuple[int, ...]], nn.Module]] = {
    "nearest": NearestUpsampling,
    "window_attention": WindowUpsampling,
}
