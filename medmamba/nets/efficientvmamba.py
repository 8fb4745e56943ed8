"""EfficientVMamba: atrous selective scan on the large maps, inverted residuals on the small ones, a classifier.

Letters: B batch, C channels, D inner channels, H, W the map, K classes.
Definition followed: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba" and its released models.
Parameter names are the official ones. Truth for tests: golden cases `efficientvmamba`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.squeeze import maybe_empty_linear
from medmamba.layers.ss2d import (
    ChannelLinear,
    ChannelMlp,
    ChannelNorm,
    ClassHead,
    PatchMerging,
    ScanParameters,
    Stage,
    depthwise,
    initial_weights,
)

STEP = 2  # the four sequences start at offsets 0 and 1, so a larger step would leave pixels unwritten


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientVMambaConfig:
    """Defaults: the released tiny network. Four stages: two of scans, two of convolutions."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    depths: tuple[int, ...] = (2, 2, 4, 2)
    widths: tuple[int, ...] = (48, 96, 192, 384)
    patch: int = 4
    state: int = 16
    ratio: float = 2.0
    mlp_ratio: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ConfigError(f"depths {self.depths} and widths {self.widths}: one of each for every stage")


def skip_sample(x: Tensor) -> Tensor:
    """(B, D, H, W), even H and W -> (B, 4, D, H*W/4): quarters of the pixels, odd rows read column by column."""
    quarters = []
    for column in range(STEP):
        for row in range(STEP):
            quarter = x[:, :, row::STEP, column::STEP]
            quarters.append((quarter.mT if row else quarter).flatten(2))
    return torch.stack(quarters, dim=1)


def skip_restore(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, D, H*W/4) -> (B, D, H, W): every sequence back on its own pixels."""
    low, narrow = height // STEP, width // STEP
    maps = [
        y[:, k].unflatten(-1, (narrow, low)).mT if k % STEP else y[:, k].unflatten(-1, (low, narrow)) for k in range(4)
    ]
    columns = [torch.stack(maps[2 * c : 2 * c + 2], dim=3).flatten(2, 3) for c in range(STEP)]  # rows interleaved
    return torch.stack(columns, dim=4).flatten(3, 4)


class ES2D(ScanParameters):
    """The atrous scan of a map (B, C, H, W), gated. Odd sizes are padded by zeros that take part in the scans."""

    def __init__(
        self,
        channels: int,
        *,
        state: int = 16,
        ratio: float = 2.0,
        dt_rank: int | None = None,
        conv: int = 3,
        conv_bias: bool = True,
    ) -> None:
        inner = int(ratio * channels)
        super().__init__(channels=channels, inner=inner, directions=4, state=state, dt_rank=dt_rank)
        self.out_norm = ChannelNorm(inner)
        self.in_proj = ChannelLinear(channels, 2 * inner, bias=False)
        self.conv2d = depthwise(inner, conv, bias=conv_bias)
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x, z = self.in_proj(x).chunk(2, dim=1)
        x = F.pad(F.silu(self.conv2d(x)), (0, width % STEP, 0, height % STEP))
        y = skip_restore(self.scan(skip_sample(x)), *x.shape[2:])[:, :, :height, :width]
        return self.out_proj(self.out_norm(y) * F.silu(z))


class ChannelGate(nn.Module):
    """t times a sigmoid made from the mean of its normalised map."""

    def __init__(self, channels: int, reduction: float = 0.125) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.global_reduce = maybe_empty_linear(channels, int(channels * reduction))
        self.channel_select = maybe_empty_linear(int(channels * reduction), channels)

    def forward(self, t: Tensor) -> Tensor:
        mean = self.norm(t).mean(dim=(2, 3))
        return t * torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))[:, :, None, None]


class EVSSBlock(nn.Module):
    """x plus a scan branch and a convolution branch through one gate; then an MLP if `mlp_ratio` is above 0."""

    def __init__(self, channels: int, op: nn.Module, *, mlp_ratio: float = 0.0) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.op = op
        self.conv_branch = nn.Sequential(
            depthwise(channels, 3), nn.BatchNorm2d(channels), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )
        self.se = ChannelGate(channels)
        self.mlp_ratio = mlp_ratio
        if mlp_ratio > 0:
            self.norm2 = ChannelNorm(channels)
            self.mlp = ChannelMlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.se(self.op(normed)) + self.se(self.conv_branch(normed))
        return x + self.mlp(self.norm2(x)) if self.mlp_ratio > 0 else x


class SqueezeExcite(nn.Module):
    """Channels weighed by a sigmoid of the mean map."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.conv_expand(F.relu(self.conv_reduce(mean))))


class InvertedResidual(nn.Module):
    """1 x 1 to 4C, depthwise 3 x 3, squeeze and excite, 1 x 1 back, added to the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = 4 * channels
        self.conv_pw = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU())
        self.conv_dw = nn.Sequential(depthwise(middle, 3, bias=False), nn.BatchNorm2d(middle), nn.ReLU())
        self.se = SqueezeExcite(middle, int(middle * 0.125))
        self.conv_pw2 = nn.Sequential(nn.Conv2d(middle, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x))))


class EfficientVMamba(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W."""

    Config = EfficientVMambaConfig

    def __init__(self, config: EfficientVMambaConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.patch_embed = nn.Sequential(
            nn.Conv2d(config.in_channels, widths[0], config.patch, config.patch), nn.Identity(), ChannelNorm(widths[0])
        )
        merging = [*(PatchMerging(a, b) for a, b in pairwise(widths)), None]
        self.layers = nn.ModuleList(
            scan_stage(config, width, depth, after) if level < 2 else convolution_stage(width, depth, after)
            for level, (width, depth, after) in enumerate(zip(widths, config.depths, merging, strict=True))
        )
        self.classifier = ClassHead(widths[-1], config.out_channels)
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def scan_stage(config: EfficientVMambaConfig, width: int, depth: int, after: nn.Module | None) -> Stage:
    """EVSS blocks and the merging behind them."""
    blocks = []
    for _ in range(depth):
        op = ES2D(width, state=config.state, ratio=config.ratio)
        blocks.append(EVSSBlock(width, op, mlp_ratio=config.mlp_ratio))
    return Stage(blocks, after)


def convolution_stage(width: int, depth: int, after: nn.Module | None) -> nn.Sequential:
    """Inverted residuals and the merging; the empty places keep the official numbering."""
    blocks: Sequence[nn.Module] = [InvertedResidual(width) for _ in range(depth)]
    return nn.Sequential(nn.Identity(), *blocks, nn.Identity(), *([] if after is None else [after]))
