"""VSSD: one state for the whole image, read by every position; a classifier (B, C, H, W) -> (B, K).

Letters: B batch, C channels, D inner channels, E first width, H, W the map, L = H * W, G groups, N states, K classes.
Definition followed: "VSSD: Vision Mamba with Non-Causal State Space Duality". Parameter names are the official ones.
Truth for tests: ops.ssd.ssd_noncausal_sequential, golden cases `vssd`. Left out: stochastic depth.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.conv_norm import ConvNorm
from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.ss2d import ChannelLinear, ChannelMlp, ChannelNorm, Stage, depthwise, initial_weights
from medmamba.ops.ssd import ssd_noncausal


@dataclass(frozen=True, slots=True, kw_only=True)
class VSSDConfig:
    """Defaults: the released tiny network. `mixers` names the mixer of each stage: "state_space" or "attention"."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    width: int = 64
    depths: tuple[int, ...] = (2, 4, 8, 4)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    mixers: tuple[str, ...] = ("state_space", "state_space", "state_space", "attention")
    state: int = 64
    expand: float = 2
    groups: int = 1
    positive: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.heads) == len(self.mixers):
            raise ConfigError(
                f"depths {self.depths}, heads {self.heads}, mixers {self.mixers}: one of each for a stage"
            )
        unknown = set(self.mixers) - {"state_space", "attention"}
        if unknown:
            raise ConfigError(f"mixers {sorted(unknown)} unknown; known: state_space, attention")


class NonCausalSSD(nn.Module):
    """Non-causal state-space duality over a map (B, C, H, W).

    `positive`: tokens enter the state with dt * exp(A_log); else with its negative, dt * A.
    """

    def __init__(
        self, channels: int, *, heads: int, state: int, expand: float = 2, groups: int = 1, positive: bool = True
    ) -> None:
        super().__init__()
        inner = int(expand * channels)
        if inner % heads or heads % groups:
            raise ConfigError(f"{heads} heads must divide {inner} inner channels and be a multiple of {groups} groups")
        self.inner, self.heads, self.groups, self.positive = inner, heads, groups, positive
        self.sizes = [inner, groups * state, groups * state]
        self.in_proj = ChannelLinear(channels, 2 * inner + 2 * groups * state + heads, bias=False)
        self.conv2d = depthwise(sum(self.sizes), 3)
        self.dt_bias = nn.Parameter(inverse_softplus_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = ChannelNorm(inner)
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        space = x.shape[2:]
        z, xBC, dt = self.in_proj(x).split([self.inner, sum(self.sizes), self.heads], dim=1)
        x, B, C = (t.flatten(2).mT for t in F.silu(self.conv2d(xBC)).split(self.sizes, dim=1))
        x = x.unflatten(-1, (self.heads, -1))
        weight = F.softplus(dt.flatten(2).mT + self.dt_bias) * torch.exp(self.A_log)
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        y = ssd_noncausal(x, weight if self.positive else -weight, B, C) + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(2).mT.unflatten(-1, space)) * z)


class Attention(nn.Module):
    """Softmax attention between all positions of a map (B, C, H, W)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigError(f"{heads} heads must divide {channels} channels")
        self.heads = heads
        self.to_qkv = ChannelLinear(channels, 3 * channels, bias=False)
        self.to_out = ChannelLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)).mT for t in self.to_qkv(x).chunk(3, dim=1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.mT.flatten(1, 2).unflatten(-1, x.shape[2:]))


class VSSDBlock(nn.Module):
    """Convolution, mixer, convolution, MLP, each added to the map (B, C, H, W)."""

    def __init__(self, channels: int, mixer: nn.Module, *, mlp_ratio: float) -> None:
        super().__init__()
        self.cpe1 = depthwise(channels, 3)
        self.norm1 = ChannelNorm(channels)
        self.attn = mixer
        self.cpe2 = depthwise(channels, 3)
        self.norm2 = ChannelNorm(channels)
        self.mlp = ChannelMlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.cpe2(x)
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """Image (B, C, H, W) -> (B, E, H/4, W/4) by convolutions, the middle ones with a residual."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = ConvNorm(channels, half, 3, stride=2, activation=F.relu)
        self.conv2 = nn.Sequential(ConvNorm(half, half, 3, activation=F.relu), ConvNorm(half, half, 3))
        self.conv3 = nn.Sequential(
            ConvNorm(half, 4 * width, 3, stride=2, activation=F.relu), ConvNorm(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv3(self.conv2(x) + x)


class Halving(nn.Module):
    """(B, C, H, W) -> (B, 2C, H/2, W/2) through 8C channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 8 * channels
        self.conv = nn.Sequential(
            ConvNorm(channels, wide, bias=True, norm=False, activation=F.relu),
            ConvNorm(wide, wide, 3, stride=2, groups=wide, bias=True, norm=False, activation=F.relu),
            ConvNorm(wide, 2 * channels, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class VSSD(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W."""

    Config = VSSDConfig

    def __init__(self, config: VSSDConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Stem(config.in_channels, config.width)
        stages = []
        for level, (depth, heads, mixer) in enumerate(zip(config.depths, config.heads, config.mixers, strict=True)):
            width = config.width * 2**level
            blocks = [block(config, width, heads, mixer) for _ in range(depth)]
            stages.append(Stage(blocks, Halving(width) if level + 1 < len(config.depths) else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.out_channels)
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.flatten(2).mT).mean(dim=1))


def block(config: VSSDConfig, width: int, heads: int, mixer: str) -> VSSDBlock:
    """One block of the given width with the named mixer."""
    if mixer == "attention":
        return VSSDBlock(width, Attention(width, heads), mlp_ratio=config.mlp_ratio)
    state_space = NonCausalSSD(
        width,
        heads=heads,
        state=config.state,
        expand=config.expand,
        groups=config.groups,
        positive=config.positive,
    )
    return VSSDBlock(width, state_space, mlp_ratio=config.mlp_ratio)
