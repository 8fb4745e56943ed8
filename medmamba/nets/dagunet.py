"""DAGUNet: a 3D U-Net whose bottom attends over positions and over channels, with an image pyramid.

Letters in this file: B batch, C channels, L positions of a map, K classes.
Definition followed: Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention
mechanisms" (2021), as its published code was read. There is no golden case: the published code draws the convolutions
of its position attention anew at every call and never trains them. Here they are ordinary trainable ones. The width
and the kernel of the guiding convolutions are ours (the level's width, the stride). Without the position convolutions
this network has as many values as the published one: 25,727,626 (widths 16, 32, 128, 256, 256, all levels scored).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.map_attention import PositionAttention
from medmamba.nets.agunet import (
    AGUNetConfig,
    Block,
    batch_norm,
    check_size,
    cut,
    encode,
    encoder,
    own_tensors,
    upsampling,
)

DROPOUT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DAGUNetConfig(AGUNetConfig):
    """As AGUNet; `guiding` shows the attended bottom map to every decoder level."""

    guiding: bool = False


class ChannelAttention(nn.Module):
    """x (B, C, *space) + gamma * x mixed over channels; like channels attract each other, as published."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        weights = (flat @ flat.mT).softmax(dim=-1)
        return self.gamma * (weights.mT @ flat).reshape(x.shape) + x


class AttentionBranch(nn.Module):
    """Attention, convolution, batch norm, ReLU, dropout of whole channels, convolution; the width stays."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.norm = batch_norm(width)
        self.dropout = nn.Dropout3d(DROPOUT)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(self.attention(x))))
        out: Tensor = self.conv2(self.dropout(x))
        return out


class DualAttention(nn.Module):
    """The sum of both branches, dropout, pointwise convolution, batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = AttentionBranch(width, PositionAttention(width, rank=3, bias=False))
        self.channel = AttentionBranch(width, ChannelAttention())
        self.dropout = nn.Dropout3d(DROPOUT)
        self.conv = nn.Conv3d(width, width, 1)
        self.norm = batch_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(self.dropout(self.position(x) + self.channel(x))))
        return out


class GuidedLevel(nn.Module):
    """Concatenate guide, skip and what comes from below; batch norm and ReLU on all of it; block."""

    def __init__(self, inner: int, outer: int, *, guide: int, stride: int) -> None:
        super().__init__()
        self.guide = nn.ConvTranspose3d(guide, outer, stride, stride) if guide else None
        self.up = upsampling(inner, outer)
        joined = outer * (3 if guide else 2)
        self.norm = batch_norm(joined)
        self.block = Block(joined, outer)

    def forward(self, x: Tensor, skip: Tensor, bottom: Tensor) -> Tensor:
        size = skip.shape[2:]
        parts = [skip, cut(self.up(x), size)]
        if self.guide is not None:
            parts.insert(0, self.guide(bottom))
        out: Tensor = self.block(F.relu(self.norm(torch.cat(parts, dim=1))))
        return out


class DAGUNet(nn.Module):
    """Volume (B, C, z, y, x) -> scores before the softmax (B, K, z, y, x), or a tuple of them, finest first.

    The bottom holds (number of its positions)^2 attention weights.
    """

    Config = DAGUNetConfig

    def __init__(self, config: DAGUNetConfig) -> None:
        super().__init__()
        self.config = config
        deepest_first, bottom = config.widths[::-1], config.widths[-1]
        self.encoder = encoder(config)
        self.attention = DualAttention(bottom)
        self.decoder = nn.ModuleList(
            GuidedLevel(a, b, guide=bottom if config.guiding else 0, stride=2**number)
            for number, (a, b) in enumerate(pairwise(deepest_first), start=1)
        )
        scored = deepest_first[1:] if config.deep_supervision else config.widths[:1]
        self.heads = nn.ModuleList(nn.Conv3d(width, config.out_channels, 1) for width in scored)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_size(image, self.config.multiple)
        maps = encode(self.encoder, image)
        bottom = self.attention(maps[-1])
        x, decoded = bottom, []
        for level, skip in zip(self.decoder, maps[-2::-1]):
            x = level(x, skip, bottom)
            decoded.append(x)
        scores = [head(map_) for head, map_ in zip(self.heads, decoded[-len(self.heads) :])]
        return tuple(scores[::-1]) if self.config.deep_supervision else scores[0]

    def own_tensors(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As AGUNet's."""
        return own_tensors(self, published)
