"""MambaOut: the gated convolution blocks of a Mamba network without the state space, as an image classifier.

Letters in this file: B batch, C channels, K classes.
Definition followed: Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?" (CVPR 2025), any rank here (2 in the
paper). Truth for tests: golden cases mambaout.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.drop_path import DropPath, drop_rates
from medmamba.layers.nd import CONV, channels_first, channels_last, check_rank, same_conv

EPS = 1e-6  # of every LayerNorm of this network


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaOutConfig:
    """Sizes of a MambaOut; `conv_ratio` * C channels of a block are convolved (from C, not the hidden width)."""

    in_channels: int = 3
    out_channels: int = 1000
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 576)
    kernel: int = 7
    conv_ratio: float = 1.0
    expansion: float = 8 / 3
    head_expansion: int = 4
    drop_path: float = 0.0
    spatial_dims: int = 2


class GatedConvBlock(nn.Module):
    """x (B, *space, C) + fc2(GELU(gate) * [value, convolved value]), all from one linear of LayerNorm(x)."""

    def __init__(self, width: int, config: MambaOutConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = int(config.expansion * width)
        convolved = int(config.conv_ratio * width)
        if not 0 < convolved <= hidden:
            raise ConfigError(f"conv_ratio {config.conv_ratio} of {width} channels: 1 to {hidden} can be convolved")
        self.sizes = [hidden, hidden - convolved, convolved]
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.conv = same_conv(convolved, convolved, (config.kernel,) * config.spatial_dims, groups=convolved)
        self.fc2 = nn.Linear(hidden, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        gate, value, convolved = self.fc1(self.norm(x)).split(self.sizes, dim=-1)
        convolved = channels_last(self.conv(channels_first(convolved)))
        return x + self.drop_path(self.fc2(F.gelu(gate) * torch.cat([value, convolved], dim=-1)))


class Stem(nn.Module):
    """Image (B, C_in, *space) -> (B, *space / 4, C), two strided convolutions with norms."""

    def __init__(self, config: MambaOutConfig) -> None:
        super().__init__()
        conv, width = CONV[config.spatial_dims], config.widths[0]
        self.conv1 = conv(config.in_channels, width // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(width // 2, eps=EPS)
        self.conv2 = conv(width // 2, width, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(width, eps=EPS)

    def forward(self, image: Tensor) -> Tensor:
        x = F.gelu(self.norm1(channels_last(self.conv1(image))))
        out: Tensor = self.norm2(channels_last(self.conv2(channels_first(x))))
        return out


class Downsampling(nn.Module):
    """(B, *space, C) -> (B, *space / 2, C'), a strided convolution and a norm."""

    def __init__(self, in_width: int, out_width: int, rank: int) -> None:
        super().__init__()
        self.conv = CONV[rank](in_width, out_width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(channels_last(self.conv(channels_first(x))))
        return out


class ClassHead(nn.Module):
    """Features (B, C) -> logits (B, K) by a hidden layer with GELU and LayerNorm."""

    def __init__(self, width: int, config: MambaOutConfig) -> None:
        super().__init__()
        hidden = config.head_expansion * width
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=EPS)
        self.fc2 = nn.Linear(hidden, config.out_channels)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.norm(F.gelu(self.fc1(features))))
        return logits


class MambaOut(nn.Module):
    """Image (B, C, *space) of any size -> class logits (B, K)."""

    Config = MambaOutConfig

    def __init__(self, config: MambaOutConfig) -> None:
        super().__init__()
        if len(config.depths) != len(config.widths) or not config.widths:
            raise ConfigError(f"one depth per width wanted, got {config.depths} and {config.widths}")
        check_rank(config.spatial_dims)
        self.config = config
        widths = config.widths
        later = (Downsampling(a, b, config.spatial_dims) for a, b in pairwise(widths))
        self.downsample_layers = nn.ModuleList([Stem(config), *later])
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(GatedConvBlock(width, config, next(rates)) for _ in range(depth)))
            for width, depth in zip(widths, config.depths)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.head = ClassHead(widths[-1], config)
        self.apply(initialise)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
        logits: Tensor = self.head(self.norm(x.flatten(1, -2).mean(1)))
        return logits


def initialise(module: nn.Module) -> None:
    """Truncated normal (0.02) weights and zero biases for linear and convolution layers."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
