"""HRVMamba's dynamic visual state space (DVSS) block: multi-kernel mixing, deformable convolution, cross scan.

Letters: B batch, C channels, D inner channels, G groups, H, W the map; 9 taps of a 3 x 3 kernel.
Definition followed: "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction"; the deformable
convolution is DCNv4, whose published kernel exists for CUDA alone and was read, not run, so the golden case
`hrvmamba_dvss` is weaker evidence than the others. Parameter names are the official ones.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.ss2d import SS2D, ChannelLinear, ChannelMlp, ChannelNorm, default_rank, depthwise

KERNELS = (3, 5, 7, 9)
TAPS = 9
OFFSET_MULTIPLE = 8  # the offsets' projection is padded to a multiple of this many channels
WIDE_STEP = 80  # blocks whose width is a multiple of this one see a depthwise convolution before the offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class DVSSConfig:
    """One block."""

    channels: int = 64
    state: int = 1
    ratio: float = 2.0
    dt_rank: int | None = None
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.channels % len(KERNELS):
            raise ConfigError(f"{self.channels} channels: the shuffle wants a multiple of {len(KERNELS)}")


class DeformableConv(nn.Module):
    """DCNv4 over a map (B, D, H, W): nine taps a group, moved by learned offsets and weighed by raw learned weights."""

    def __init__(self, channels: int, groups: int, *, depthwise_offsets: bool = False) -> None:
        super().__init__()
        if channels % groups:
            raise ConfigError(f"{groups} groups do not divide {channels} channels")
        self.groups = groups
        self.offset_mask_dw = depthwise(channels, 3) if depthwise_offsets else nn.Identity()
        padded = math.ceil(3 * TAPS * groups / OFFSET_MULTIPLE) * OFFSET_MULTIPLE
        self.offset_mask = ChannelLinear(channels, padded)
        self.value_proj = ChannelLinear(channels, channels)
        self.output_proj = ChannelLinear(channels, channels, bias=False)
        for tensor in (self.offset_mask.weight, self.offset_mask.bias, self.value_proj.bias):
            nn.init.zeros_(tensor)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        space = x.shape[2:]
        learned = self.offset_mask(self.offset_mask_dw(x))[:, : 3 * TAPS * self.groups]
        learned = learned.unflatten(1, (self.groups, 3 * TAPS)).flatten(0, 1)  # (B*G, 27, H, W)
        offsets, weights = learned[:, : 2 * TAPS].unflatten(1, (TAPS, 2)), learned[:, 2 * TAPS :]
        values = self.value_proj(x).unflatten(1, (self.groups, -1)).flatten(0, 1)
        taps = sample(values, tap_positions(*space, like=x) + offsets)
        mixed = torch.einsum("bdmhw,bmhw->bdhw", taps, weights)
        return self.output_proj(mixed.unflatten(0, (x.shape[0], self.groups)).flatten(1, 2))


def tap_positions(height: int, width: int, *, like: Tensor) -> Tensor:
    """Undeformed positions (9, 2, H, W) in pixels, x before y; tap 3i + j lies at (x - 1 + i, y - 1 + j)."""
    step = torch.arange(-1, 2, device=like.device)
    x = torch.arange(width, device=like.device) + step[:, None]  # (3, W)
    y = torch.arange(height, device=like.device) + step[:, None]  # (3, H)
    x_all = x[:, None, None, :].expand(3, 3, height, width)
    y_all = y[None, :, :, None].expand(3, 3, height, width)
    return torch.stack([x_all, y_all], dim=2).flatten(0, 1).to(like.dtype)


def sample(values: Tensor, positions: Tensor) -> Tensor:
    """Bilinear values (B, D, M, H, W) of a map (B, D, H, W) at pixel positions (B, M, 2, H, W); outside counts 0."""
    height, width = values.shape[2:]
    size = positions.new_tensor([width, height])[:, None, None]
    grid = ((2 * positions + 1) / size - 1).movedim(2, -1)  # (B, M, H, W, 2)
    sampled = F.grid_sample(values, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    return sampled.unflatten(2, (positions.shape[1], height))


class DVSSBlock(nn.Module):
    """The block (B, C, H, W) -> (B, C, H, W)."""

    Config = DVSSConfig

    def __init__(self, config: DVSSConfig) -> None:
        super().__init__()
        self.config = config
        channels, part = config.channels, config.channels // len(KERNELS)
        self.parts = [channels - 3 * part, part, part, part]  # a remainder belongs to the first
        self.conv2d = nn.ModuleList(depthwise(n, size) for n, size in zip(self.parts, KERNELS, strict=True))
        self.norm0 = ChannelNorm(channels)
        self.norm = ChannelNorm(channels)
        self.op = SS2D(channels, state=config.state, ratio=config.ratio, dt_rank=config.dt_rank, conv=1)
        inner, wide = int(config.ratio * channels), channels % WIDE_STEP == 0
        self.op.conv2d = DeformableConv(inner, default_rank(channels), depthwise_offsets=wide)
        self.norm2 = ChannelNorm(channels)
        self.mlp = ChannelMlp(channels, int(channels * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self._mix_kernels(self.norm0(x)))
        x = x + self.op(self.norm(x))
        return x + self.mlp(self.norm2(x))

    def _mix_kernels(self, t: Tensor) -> Tensor:
        """Each part of the channels through its own kernel, then shuffled among the four."""
        mixed = [conv(part) for conv, part in zip(self.conv2d, t.split(self.parts, dim=1), strict=True)]
        return F.channel_shuffle(torch.cat(mixed, dim=1), len(KERNELS))
