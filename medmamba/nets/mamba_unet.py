"""Mamba U-Net for dense prediction, 2D and 3D: (B, C, *space) -> (B, K, *space), any size.

Letters in this file: B batch, C channels, K output channels, D channels of a scan, L positions, N states.
A block is x + W2 m(SiLU(conv(LayerNorm(x)))) with m(t) = t + scan(t), the scan in both directions along the raster
order whose slowest axis changes from block to block. Norms are over channels alone, so a patch and a whole image agree.
Selective scan: Gu and Dao, "Mamba", section 3; truth for tests: ops.scan.scan_sequential. Maps are kept channels-last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.nd import CONV, CONV_TRANSPOSE, channels_first, channels_last, same_conv
from medmamba.ops.scan import selective_scan

MIXERS = ("s6", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaUNetConfig:
    """`widths` and `depths` (blocks, going down and up alike) per level, finest first; `strides` between levels, one
    tuple of `spatial_dims` numbers each (None: 2 on every axis). `mixer` works from level `mixer_from` down."""

    spatial_dims: int = 3
    in_channels: int = 1
    out_channels: int = 2
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (2, 2, 2)
    strides: tuple[tuple[int, ...], ...] | None = None
    state: int = 8
    mixer: str = "s6"
    mixer_from: int = 1

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims={self.spatial_dims}: a Mamba U-Net has 2 or 3")
        if self.mixer not in MIXERS:
            raise ConfigError(f"unknown mixer {self.mixer!r}; known: {', '.join(MIXERS)}")
        if not self.widths or len(self.widths) != len(self.depths):
            raise ConfigError(f"widths {self.widths} and depths {self.depths}: one of each for every level")
        if min(*self.widths, *self.depths, self.state, self.in_channels, self.out_channels) < 1:
            raise ConfigError(f"widths, depths, state and channels must be 1 or more, got {self}")
        if len(self.steps) != len(self.widths) - 1 or any(
            len(s) != self.spatial_dims or min(s) < 1 for s in self.steps
        ):
            raise ConfigError(
                f"strides {self.strides}: give {len(self.widths) - 1} for {len(self.widths)} levels, "
                f"{self.spatial_dims} positive numbers each"
            )

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The strides, defaults filled in."""
        if self.strides is None:
            return ((2,) * self.spatial_dims,) * (len(self.widths) - 1)
        return tuple(tuple(s) for s in self.strides)

    @property
    def multiple(self) -> tuple[int, ...]:
        """Sizes that need no padding are multiples of this, per axis."""
        return tuple(math.prod(s[axis] for s in self.steps) for axis in range(self.spatial_dims))


class RasterScan(nn.Module):
    """Selective scan forth and back over a map (B, *space, D), `axis` slowest; the sum of both, same shape.

    The two directions are two groups of one scan. Always float32 (float64 stays), whatever autocast says.
    """

    def __init__(self, width: int, *, state: int, axis: int) -> None:
        super().__init__()
        self.width, self.state, self.axis, self.rank = width, state, axis, math.ceil(width / 16)
        self.project = nn.Linear(width, 2 * (self.rank + 2 * state), bias=False)
        self.step = nn.Parameter(torch.empty(2, width, self.rank).uniform_(-(self.rank**-0.5), self.rank**-0.5))
        self.step_bias = nn.Parameter(inverse_softplus_steps(2 * width))
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(2 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        spatial = list(range(1, x.ndim - 1))
        order = spatial[self.axis :] + spatial[: self.axis]
        turned = x.permute(0, *order, x.ndim - 1)
        with torch.autocast(x.device.type, enabled=False):
            y = self._both_ways(turned.flatten(1, -2).to(self.A_log.dtype)).view(turned.shape)
        back = [order.index(a) + 1 for a in spatial]
        return y.permute(0, *back, x.ndim - 1).to(x.dtype)

    def _both_ways(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D)."""
        two = torch.stack([tokens, tokens.flip(1)], dim=1)  # (B, 2, L, D)
        sizes = [self.rank, self.state, self.state]
        forth, back = self.project.weight.chunk(2)
        low, B, C = torch.stack([two[:, 0] @ forth.T, two[:, 1] @ back.T], dim=1).mT.split(sizes, dim=2)  # (B, 2, ., L)
        y = selective_scan(
            two.mT.flatten(1, 2),
            (self.step @ low).flatten(1, 2),
            -self.A_log.exp(),
            B,
            C,
            delta_bias=self.step_bias,
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        y_forth, y_back = y.chunk(2, dim=1)
        return (y_forth + y_back.flip(-1)).mT


class Block(nn.Module):
    """x + W2 m(SiLU(conv(norm(x)))) on maps (B, *space, C); m(t) = t + scan(t), or t without a mixer."""

    def __init__(self, width: int, rank: int, mixer: nn.Module | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = same_conv(width, width, (3,) * rank)
        self.mixer = mixer
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        t = F.silu(channels_last(self.conv(channels_first(self.norm(x)))))
        t = t if self.mixer is None else t + self.mixer(t)
        out: Tensor = x + self.out(t)
        return out


class MambaUNet(nn.Module):
    """The network (B, C, *space) -> (B, K, *space). Skips are added; odd sizes are padded at the far ends."""

    Config = MambaUNetConfig

    def __init__(self, config: MambaUNetConfig) -> None:
        super().__init__()
        self.config = config
        rank, widths, steps = config.spatial_dims, config.widths, config.steps
        pairs = list(zip(widths, widths[1:], steps, strict=False))
        made = 0

        def level(index: int) -> nn.Sequential:
            nonlocal made
            blocks = []
            for _ in range(config.depths[index]):
                mixed = config.mixer == "s6" and index >= config.mixer_from
                scan = RasterScan(widths[index], state=config.state, axis=made % rank) if mixed else None
                blocks.append(Block(widths[index], rank, scan))
                made += 1
            return nn.Sequential(*blocks)

        self.stem = same_conv(config.in_channels, widths[0], (3,) * rank)
        self.encoder = nn.ModuleList(level(i) for i in range(len(widths)))
        self.down = nn.ModuleList(CONV[rank](a, b, step, step) for a, b, step in pairs)  # type: ignore[arg-type]
        self.up = nn.ModuleList(CONV_TRANSPOSE[rank](b, a, step, step) for a, b, step in pairs)  # type: ignore[arg-type]
        self.decoder = nn.ModuleList(level(i) for i in range(len(widths) - 1))
        self.norm = nn.LayerNorm(widths[0])
        self.head = nn.Linear(widths[0], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        rank = self.config.spatial_dims
        if x.ndim != rank + 2 or x.shape[1] != self.config.in_channels:
            raise ShapeError(f"Mamba U-Net wants (B, {self.config.in_channels}, {rank} axes), got {tuple(x.shape)}")
        space = x.shape[2:]
        x = self._padded(x).contiguous(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
        x = self.encoder[0](channels_last(self.stem(x)))
        skips = []
        for down, blocks in zip(self.down, self.encoder[1:], strict=True):
            skips.append(x)
            x = blocks(channels_last(down(channels_first(x))))
        for up, blocks, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips), strict=True):
            x = blocks(skip + channels_last(up(channels_first(x))))
        scores = channels_first(self.head(self.norm(x)))
        kept: list[EllipsisType | slice] = [..., *(slice(n) for n in space)]
        return scores[tuple(kept)]

    def _padded(self, x: Tensor) -> Tensor:
        """Edge values repeated at the far ends up to the next multiple of the strides."""
        lacking = [-n % m for n, m in zip(x.shape[2:], self.config.multiple, strict=True)]
        pads = [p for n in reversed(lacking) for p in (0, n)]
        return F.pad(x, pads, mode="replicate") if any(lacking) else x
