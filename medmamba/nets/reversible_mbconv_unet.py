"""U-Net of reversible inverted bottlenecks, 2D and 3D: (B, C, *space) -> (B, K, *space).

Letters in this file: B batch, C channels, K output channels; a level works on two halves (B, *space, width / 2).
Definition followed: Pendse et al., "Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks for Brain
Tumor Segmentation" (BrainLes 2020, arXiv 2104.09648), rebuilt from its abstract: neither code nor the tables of channel
counts are public. Known: a U-Net of couplings whose branches are inverted bottlenecks (1 x 1 expansion, depthwise 3^d,
linear 1 x 1 projection). From the textbook: y1 = x1 + F(x2), y2 = x2 + G(y1); in F and G a norm behind each of the
three, an activation behind the first two; changes of resolution are not reversible and keep their activations. Chosen
here: widths, depths, expansion, layer norm over channels (batch statistics would be counted twice by the
recomputation), SiLU, strided convolutions between levels, skips added, the rounding to a grid.
Truth for tests: gradients of the stored run, the inverse.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.grid import Grid
from medmamba.layers.nd import channels_first, channels_last, crop_to, pad_to_multiple, same_conv
from medmamba.layers.reversible import MODES, Add, Reversible, State, Step, coupling
from medmamba.layers.strided import Stem, StridedDown, StridedUp


@dataclass(frozen=True, slots=True, kw_only=True)
class ReversibleMBConvUNetConfig:
    """`widths` and `depths` (couplings, going down and up alike) per level, finest first, stride 2 between them;
    `expand` of the inverted bottleneck. `grid_bits` None: couplings without rounding, as published."""

    spatial_dims: int = 3
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    expand: int = 4
    grid_bits: int | None = 14

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims={self.spatial_dims}: this U-Net has 2 or 3")
        if not self.widths or len(self.widths) != len(self.depths):
            raise ConfigError(f"widths {self.widths} and depths {self.depths}: one of each for every level")
        if min(*self.widths, *self.depths, self.expand) < 1 or any(w % 2 for w in self.widths):
            raise ConfigError(
                f"widths must be even (couplings work on halves), depths and expand 1 or more, got {self}"
            )

    @property
    def multiple(self) -> tuple[int, ...]:
        """Sizes that need no padding are multiples of this, per axis."""
        return (2 ** (len(self.widths) - 1),) * self.spatial_dims


class InvertedBottleneck(nn.Module):
    """Stream (B, *space, C) -> its change: wide inside, depthwise, narrow again; a norm behind each, a linear end."""

    def __init__(self, width: int, rank: int, expand: int) -> None:
        super().__init__()
        wide = expand * width
        self.expand, self.expand_norm = nn.Linear(width, wide), nn.LayerNorm(wide)
        self.depthwise, self.depthwise_norm = same_conv(wide, wide, (3,) * rank, groups=wide), nn.LayerNorm(wide)
        self.project, self.project_norm = nn.Linear(wide, width), nn.LayerNorm(width)

    def forward(self, stream: Tensor) -> Tensor:
        t = F.silu(self.expand_norm(self.expand(stream)))
        t = F.silu(self.depthwise_norm(channels_last(self.depthwise(channels_first(t)))))
        out: Tensor = self.project_norm(self.project(t))
        return out


class ReversibleMBConvUNet(nn.Module):
    """The network; odd sizes are padded at the far ends. `memory`: "stages" (the paper's) or "stored"."""

    Config = ReversibleMBConvUNetConfig
    modes = MODES[:2]

    def __init__(self, config: ReversibleMBConvUNetConfig, *, memory: str = "stages") -> None:
        super().__init__()
        self.config, self.memory = config, memory
        rank, widths = config.spatial_dims, config.widths
        stride = (2,) * rank
        pairs = list(itertools.pairwise(widths))
        down: list[list[Step]] = [[*level(config, i), StridedDown(a, b, stride)] for i, (a, b) in enumerate(pairs)]
        up: list[list[Step]] = [[StridedUp(b, a, stride), *level(config, i)] for i, (a, b) in enumerate(pairs)]
        parts: list[list[Step]] = [*down, [*level(config, len(pairs))], *reversed(up)]
        self.grid = Grid(config.grid_bits)
        self.stem = Stem(config.in_channels, widths[0], rank)
        self.body = Reversible([step for part in parts for step in part])
        self.head = nn.Linear(widths[0], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if x.ndim != config.spatial_dims + 2 or x.shape[1] != config.in_channels:
            raise ShapeError(f"wanted (B, {config.in_channels}, {config.spatial_dims} axes), got {tuple(x.shape)}")
        snap = self.grid()
        state = self.stem(pad_to_multiple(x, config.multiple), snap)
        halves = self.body(snap.watched(state, ()), snap, self.memory)
        return crop_to(channels_first(self.scores(halves)), x.shape[2:])

    def scores(self, halves: State) -> Tensor:
        """What the head says of the halves at the end of the body, (B, *space, K)."""
        a, b = halves
        weight_a, weight_b = self.head.weight.chunk(2, dim=1)  # the halves side by side, without a copy of both
        return F.linear(a, weight_a, self.head.bias) + F.linear(b, weight_b)


def level(config: ReversibleMBConvUNetConfig, index: int) -> list[Add]:
    """The couplings of a level."""
    half, rank = config.widths[index] // 2, config.spatial_dims
    pairs = (
        coupling(*(InvertedBottleneck(half, rank, config.expand) for _ in range(2)))
        for _ in range(config.depths[index])
    )
    return [step for pair in pairs for step in pair]
