"""Between images and token maps: cutting into patches, and spreading channels over finer positions; any rank.

Letters in this file: B batch, C channels. Token maps are channels-last, (B, *space, C).
Definition followed: Cao et al., "Swin-Unet" (2021). Truth for tests: golden cases attswinunet and dformer.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.nd import CONV, channels_last, check_rank


class PatchEmbed(nn.Module):
    """Image (B, C, *space) -> (B, *space / patch, width): a convolution per patch, LayerNorm."""

    def __init__(self, in_channels: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.proj = CONV[check_rank(len(patch))](in_channels, width, patch, patch)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.norm(channels_last(self.proj(image)))
        return out


class PatchExpand(nn.Module):
    """(B, *space, C) -> (B, *space * factors, out): linear without bias, channels (factors..., out) spread, norm."""

    def __init__(self, width: int, out: int, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.expand = nn.Linear(width, math.prod(factors) * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        rank, space = len(self.factors), x.shape[1:-1]
        parts = self.expand(x).unflatten(-1, (*self.factors, -1))
        pairs = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
        spread = parts.permute(0, *pairs, 2 * rank + 1)
        sides = [n * factor for n, factor in zip(space, self.factors)]
        out: Tensor = self.norm(spread.reshape(len(x), *sides, -1))
        return out


def pad_image(image: Tensor, multiples: tuple[int, ...]) -> Tensor:
    """Zeros at the far end of every axis of (B, C, *space) up to a multiple."""
    sizes = zip(image.shape[:1:-1], multiples[::-1], strict=True)
    missing = [after for n, multiple in sizes for after in (0, -n % multiple)]
    return F.pad(image, missing) if any(missing) else image
