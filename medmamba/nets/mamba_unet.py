"""Mamba U-Net for dense prediction in 2D and 3D, reversible from stem to scores: (B, C, *space) -> (B, K, *space).

Letters in this file: B batch, C channels, K output channels; the body works on two halves (B, *space, width / 2).
Stem: 3^d convolution, snapped. Level: couplings a += F(b), b += G(a). F, G: norm over channels, 3^d convolution, SiLU,
t + mixer(t), 1 x 1, snapped. Down: lifted Haar of all channels; up: its inverse. Head: norm over channels, 1 x 1.
Norms look at one position alone, so a patch, a whole image and an image in slabs agree; the routes of the mixers by
default have the first axis slowest, so that a map can come in slabs along it.
Truth for tests: gradients of the stored run; ops.scan.scan_sequential; forward of inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.grid import Grid
from medmamba.layers.haar import DOWN
from medmamba.layers.mixers import MIXERS, Mixer
from medmamba.layers.nd import channels_first, channels_last, crop_to, pad_to_multiple, same_conv
from medmamba.layers.reversible import MODES, Reversible, State, Step, Undone, coupling
from medmamba.layers.strided import Stem, StridedDown, StridedUp
from medmamba.routes import ROUTES, STREAMABLE

GROUP = 8  # channels a group of the grouped convolution
EXPAND = 2  # of the inverted bottleneck
COUPLINGS = ("snapped", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaUNetConfig:
    """`widths` and `depths` (couplings, going down and up alike) per level, finest first; `strides` between levels, one
    tuple of `spatial_dims` numbers each (None: 2 on every axis). "haar" and "split" double the width at each level;
    "strided" (convolutions, not invertible) takes any even one. `mixer` works from level `mixer_from` down, over
    `routes` in turn. `coupling` "snapped" rounds to multiples of 2**-grid_bits: exact inverse, values below
    2**(24 - grid_bits)."""

    spatial_dims: int = 3
    in_channels: int = 1
    out_channels: int = 2
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (2, 2, 2)
    strides: tuple[tuple[int, ...], ...] | None = None
    down: str = "haar"
    mixer: str = "s6"
    mixer_from: int = 1
    state: int = 8
    routes: tuple[str, ...] = ("raster", "plane_columns")
    branch: str = "dense"
    coupling: str = "snapped"
    grid_bits: int = 14

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims={self.spatial_dims}: a Mamba U-Net has 2 or 3")
        known = {"mixer": (*MIXERS, "none"), "down": (*DOWN, "strided"), "branch": tuple(BRANCHES),
                 "coupling": COUPLINGS}  # fmt: skip
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(names)}")
        unknown = sorted(set(self.routes) - set(ROUTES))
        if unknown or not self.routes:
            raise ConfigError(f"unknown routes {unknown}: give one or more of {', '.join(ROUTES)}")
        self._check_levels()

    def _check_levels(self) -> None:
        if not self.widths or len(self.widths) != len(self.depths):
            raise ConfigError(f"widths {self.widths} and depths {self.depths}: one of each for every level")
        if min(*self.widths, *self.depths, self.state, self.in_channels, self.out_channels) < 1:
            raise ConfigError(f"widths, depths, state and channels must be 1 or more, got {self}")
        if any(w % 2 for w in self.widths):
            raise ConfigError(f"widths {self.widths}: a coupling works on halves, so every width must be even")
        if self.down != "strided" and any(b != 2 * a for a, b in zip(self.widths, self.widths[1:])):
            doubled = tuple(self.widths[0] * 2**i for i in range(len(self.widths)))
            raise ConfigError(f"widths {self.widths}: down={self.down!r} doubles the width; give {doubled}")
        if len(self.level_strides) != len(self.widths) - 1 or any(
            len(s) != self.spatial_dims or min(s) < 1 for s in self.level_strides
        ):
            raise ConfigError(
                f"strides {self.strides}: give {len(self.widths) - 1} for {len(self.widths)} levels, "
                f"{self.spatial_dims} positive numbers each"
            )

    @property
    def level_strides(self) -> tuple[tuple[int, ...], ...]:
        """The strides, defaults filled in."""
        if self.strides is None:
            return ((2,) * self.spatial_dims,) * (len(self.widths) - 1)
        return tuple(tuple(s) for s in self.strides)

    @property
    def multiple(self) -> tuple[int, ...]:
        """Sizes that need no padding are multiples of this, per axis."""
        return tuple(math.prod(s[axis] for s in self.level_strides) for axis in range(self.spatial_dims))

    @property
    def streamable(self) -> bool:
        """Whether every route has the first axis slowest."""
        return self.mixer in ("none", "vssd") or set(self.routes) <= set(STREAMABLE)


class DenseBranch(nn.Module):
    """Half (B, *space, C) -> its change: norm, 3^d convolution, SiLU, t + mixer(t), 1 x 1."""

    groups_of: int | None = None  # channels a group; None: all

    def __init__(self, width: int, rank: int, mixer: Mixer | None) -> None:
        super().__init__()
        groups = 1 if self.groups_of is None else width // math.gcd(width, self.groups_of)
        self.norm = nn.LayerNorm(width)
        self.conv = same_conv(width, width, (3,) * rank, groups=groups)
        self.mixer = mixer
        self.out = nn.Linear(width, width)

    def forward(self, half: Tensor) -> Tensor:
        t = self.before_mixer(half)
        if self.mixer is not None:
            t = t.contiguous()  # as streaming keeps it: a linear layer rounds otherwise where the strides are others
            t = t + self.mixer(t)
        out: Tensor = self.out(t)
        return out

    def before_mixer(self, half: Tensor) -> Tensor:
        return F.silu(channels_last(self.conv(channels_first(self.norm(half)))))


class GroupedBranch(DenseBranch):
    """The same with the convolution in groups of 8 channels: cheaper at large widths."""

    groups_of = GROUP


class InvertedBranch(DenseBranch):
    """Norm, 1 x 1 to twice the width, SiLU, depthwise 3^d convolution, SiLU, t + mixer(t), 1 x 1 back."""

    def __init__(self, width: int, rank: int, mixer: Mixer | None) -> None:
        nn.Module.__init__(self)
        wide = EXPAND * width
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, wide)
        self.conv = same_conv(wide, wide, (3,) * rank, groups=wide)
        self.mixer = mixer
        self.out = nn.Linear(wide, width)

    def before_mixer(self, half: Tensor) -> Tensor:
        t = F.silu(self.expand(self.norm(half)))
        return F.silu(channels_last(self.conv(channels_first(t))))


BRANCHES: dict[str, type[DenseBranch]] = {
    "dense": DenseBranch,
    "grouped": GroupedBranch,
    "inverted": InvertedBranch,
}


class Head(nn.Module):
    """The two halves -> scores (B, *space, K)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, state: State) -> Tensor:
        scores: Tensor = self.linear(self.norm(torch.cat(state[:2], dim=-1)))
        return scores


class MambaUNet(nn.Module):
    """The network (B, C, *space) -> (B, K, *space); sizes that are no multiple of the strides are padded at the end.

    `memory` "stored", "stages" or "full" says what training keeps: same weights and, on a CPU, the same gradients bit
    for bit. It may be changed at any time and is no part of the Config.
    """

    Config = MambaUNetConfig

    def __init__(self, config: MambaUNetConfig, *, memory: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.grid = Grid(config.grid_bits if config.coupling == "snapped" else None)
        self.stem = Stem(config.in_channels, config.widths[0], config.spatial_dims)
        self.body = Reversible(steps(config), Head(config.widths[0], config.out_channels))
        self.memory = memory or self.modes[-1]

    @property
    def modes(self) -> tuple[str, ...]:
        """The memory modes this network has, the most sparing last."""
        return MODES if self.config.down != "strided" else MODES[:2]

    def forward(self, x: Tensor) -> Tensor:
        rank = self.config.spatial_dims
        if x.ndim != rank + 2 or x.shape[1] != self.config.in_channels:
            raise ShapeError(f"Mamba U-Net wants (B, {self.config.in_channels}, {rank} axes), got {tuple(x.shape)}")
        snap = self.grid()
        state = self.stem(pad_to_multiple(x, self.config.multiple), snap)
        scores = channels_first(self.body(snap.watched(state, ()), snap, self.memory))
        return crop_to(scores, x.shape[2:])

    def scores(self, halves: State) -> Tensor:
        """What the head says of the halves at the end of the body, (B, *space, K)."""
        found: Tensor = self.body.head(halves)  # type: ignore[misc]
        return found


def steps(config: MambaUNetConfig) -> list[Step]:
    """The body: couplings and ways down, couplings, ways up and couplings."""
    made = 0

    def branch(level: int) -> nn.Module:
        nonlocal made
        half = config.widths[level] // 2
        mixer = None
        if config.mixer != "none" and level >= config.mixer_from:
            width = EXPAND * half if config.branch == "inverted" else half
            mixer = MIXERS[config.mixer](width, state=config.state, route=config.routes[made % len(config.routes)])
        made += 1
        return BRANCHES[config.branch](half, config.spatial_dims, mixer)

    def level(index: int) -> list[Step]:
        return [step for _ in range(config.depths[index]) for step in coupling(branch(index), branch(index))]

    last = len(config.widths) - 1
    ways = [changes(config, index) for index in range(last)]
    down = [step for index in range(last) for step in (*level(index), ways[index][0])]
    bottom = level(last)
    up = [step for index in reversed(range(last)) for step in (ways[index][1], *level(index))]
    return [*down, *bottom, *up]


def changes(config: MambaUNetConfig, level: int) -> tuple[Step, Step]:
    """The way down from a level and the way up to it."""
    strides = config.level_strides[level]
    if config.down == "strided":
        width, wider = config.widths[level : level + 2]
        return StridedDown(width, wider, strides), StridedUp(wider, width, strides)
    down = DOWN[config.down](strides)
    return down, Undone(down)
