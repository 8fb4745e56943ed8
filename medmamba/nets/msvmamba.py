"""MSVMamba: one scan at full resolution, three at half resolution in one long sequence, a classifier.

Letters: B batch, C channels, D inner channels, H, W the map, h, w the half-resolution map, K classes.
Definition followed: "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model" in its released form (one
full-resolution and three half-resolution directions, squeeze-excite and convolutional FFN on). Parameter names are the
official ones. Truth for tests: golden cases `msvmamba`.
"""

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
    ChannelNorm,
    ClassHead,
    PatchMerging,
    ScanParameters,
    Stage,
    depthwise,
    initial_weights,
)

HALF, FULL = 0, 1  # the parameter set of the half-resolution sequence and of the full-resolution one


@dataclass(frozen=True, slots=True, kw_only=True)
class MSVMambaConfig:
    """Defaults: the released tiny network."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    depths: tuple[int, ...] = (1, 2, 9, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    state: int = 1
    ratio: float = 2.0
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ConfigError(f"depths {self.depths} and widths {self.widths}: one of each for every stage")


class SqueezeExcite(nn.Module):
    """Channels weighed by a sigmoid of the mean map, through D / 8 channels, without biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = channels // 8
        squeeze = maybe_empty_linear(channels, reduced, bias=False)
        excite = maybe_empty_linear(reduced, channels, bias=False)
        self.fc = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class MS2D(ScanParameters):
    """The multi-scale scan of a map (B, C, H, W), gated."""

    def __init__(self, channels: int, *, state: int = 1, ratio: float = 2.0, dt_rank: int | None = None) -> None:
        inner = int(ratio * channels)
        super().__init__(channels=channels, inner=inner, directions=2, state=state, dt_rank=dt_rank)
        self.out_norm = ChannelNorm(inner)
        self.se = SqueezeExcite(inner)
        self.in_proj = ChannelLinear(channels, 2 * inner, bias=False)
        self.conv2d = depthwise(inner, 3)
        self.conv2d_b1 = depthwise(inner, 7, stride=2)
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        space = x.shape[2:]
        x, z = self.in_proj(x).chunk(2, dim=1)
        full = self._normed_scan(F.silu(self.conv2d(x)).flatten(2), FULL).unflatten(-1, space)
        coarse = F.interpolate(self._half(F.silu(self.conv2d_b1(x))), size=space, mode="bilinear", align_corners=False)
        return self.out_proj(self.se(full + coarse) * F.silu(z))

    def _half(self, g: Tensor) -> Tensor:
        """Three directions of g (B, D, h, w) as one sequence, the state running on across the seams; their sum."""
        rows, columns = g.flatten(2), g.mT.flatten(2)
        sequence = torch.cat([rows.flip(-1), columns, columns.flip(-1)], dim=-1)
        back, down, up = self._normed_scan(sequence, HALF).chunk(3, dim=-1)
        return back.flip(-1).unflatten(-1, g.shape[2:]) + (down + up.flip(-1)).unflatten(-1, g.mT.shape[2:]).mT

    def _normed_scan(self, sequence: Tensor, which: int) -> Tensor:
        """(B, D, L) -> (B, D, L): scanned with one parameter set, then normalised."""
        return self.out_norm(self.scan(sequence[:, None], first=which)[:, 0])


class ConvFFN(nn.Module):
    """1 x 1, a depthwise 3 x 3 added to it, exact GELU, 1 x 1 back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv2d(channels, hidden, 1)
        self.linear2 = nn.Conv2d(hidden, channels, 1)
        self.dwc = depthwise(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.linear1(x)
        return self.linear2(F.gelu(v + self.dwc(v)))


class MSVSSBlock(nn.Module):
    """x + MS2D(norm(x)), then x + ConvFFN(norm2(x)). Maps (B, C, H, W)."""

    def __init__(self, channels: int, *, state: int = 1, ratio: float = 2.0, dt_rank: int | None = None) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.op = MS2D(channels, state=state, ratio=ratio, dt_rank=dt_rank)
        self.convFFN = ConvFFN(channels, 2 * channels)
        self.norm2 = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        return x + self.convFFN(self.norm2(x))


class MSVMamba(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W."""

    Config = MSVMambaConfig

    def __init__(self, config: MSVMambaConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.patch_embed = nn.Sequential(
            nn.Conv2d(config.in_channels, widths[0], config.patch, config.patch), nn.Identity(), ChannelNorm(widths[0])
        )
        merging = [*(PatchMerging(a, b) for a, b in pairwise(widths)), None]
        self.layers = nn.ModuleList(
            Stage([block(config, width) for _ in range(depth)], after)
            for width, depth, after in zip(widths, config.depths, merging, strict=True)
        )
        self.classifier = ClassHead(widths[-1], config.out_channels)
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def block(config: MSVMambaConfig, width: int) -> MSVSSBlock:
    """One block of the given width."""
    return MSVSSBlock(width, state=config.state, ratio=config.ratio, dt_rank=config.dt_rank)
