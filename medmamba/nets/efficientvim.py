"""EfficientViM: mixing in the hidden states of a non-causal SSD, their multi-stage fusion in the head; a classifier.

Letters: B batch, C channels, D inner channels, S states, H, W the map, L = H * W, K classes.
Definition followed: "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality". Parameter
names are the official ones; as in the published code `A` cancels in the softmax and stays only for their sake.
Truth for tests: golden cases `efficientvim`. The published code wants square maps; here H and W are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.conv_norm import ConvNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientViMConfig:
    """Defaults: the released M1 network. `distillation` adds second heads; in evaluation the two votes are averaged."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    widths: tuple[int, ...] = (128, 192, 320)
    depths: tuple[int, ...] = (2, 2, 2)
    states: tuple[int, ...] = (49, 25, 9)
    expand: float = 1.0
    mlp_ratio: float = 4.0
    distillation: bool = False

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.states):
            raise ConfigError(f"widths {self.widths}, depths {self.depths}, states {self.states}: one of each a stage")
        if self.widths[0] < 8:
            raise ConfigError(f"first width {self.widths[0]}: the stem begins with an eighth of it, so 8 or more")


class BroadcastNorm(nn.Module):
    """Normalisation over axis 1; the affine parameters are stored as (1, C, 1, ...) with `axes` ones."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, *(1,) * axes))
        self.bias = nn.Parameter(torch.zeros(1, channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-5).movedim(-1, 1)
        return normed * self.weight + self.bias


class TokenLinear(nn.Module):
    """A 1 x 1 convolution over tokens (B, C, L) without bias."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class HiddenStateMixer(nn.Module):
    """HSM-SSD: map (B, C, H, W) -> mixed map of the same shape and its hidden states (B, C, S)."""

    def __init__(self, channels: int, *, states: int, expand: float = 1.0) -> None:
        super().__init__()
        inner = int(expand * channels)
        self.BCdt_proj = TokenLinear(channels, 3 * states)
        self.dw = ConvNorm(3 * states, 3 * states, 3, groups=3 * states, norm=False)
        self.hz_proj = TokenLinear(channels, 2 * inner)
        self.out_proj = TokenLinear(inner, channels)
        self.A = nn.Parameter(torch.empty(states).uniform_(1, 16))
        self.D = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        space = x.shape[2:]
        x = x.flatten(2)
        projected = self.dw(self.BCdt_proj(x).unflatten(-1, space)).flatten(2)
        B, C, dt = projected.chunk(3, dim=1)
        weight = (dt + self.A[:, None]).softmax(dim=-1)
        h, z = self.hz_proj(x @ (weight * B).mT).chunk(2, dim=1)
        h = self.out_proj(h * F.silu(z) + h * self.D)
        return (h @ C).unflatten(-1, space), h


class FeedForward(nn.Module):
    """1 x 1 and ReLU, 1 x 1, each with BatchNorm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(channels, hidden, activation=F.relu)
        self.fc2 = ConvNorm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class EfficientViMBlock(nn.Module):
    """Convolution, mixer, convolution, FFN, each blended with the map by a learned share; also gives the states."""

    def __init__(self, channels: int, *, states: int, expand: float = 1.0, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((4, channels), 1e-4))
        self.mixer = HiddenStateMixer(channels, states=states, expand=expand)
        self.norm = BroadcastNorm(channels, 1)
        self.dwconv1 = ConvNorm(channels, channels, 3, groups=channels)
        self.dwconv2 = ConvNorm(channels, channels, 3, groups=channels)
        self.ffn = FeedForward(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.sigmoid(self.alpha)[:, :, None, None].unbind(0)
        x = blend(x, self.dwconv1(x), shares[0])
        normed = self.norm(x.flatten(2)).unflatten(-1, x.shape[2:])
        mixed, states = self.mixer(normed)
        x = blend(x, mixed, shares[1])
        x = blend(x, self.dwconv2(x), shares[2])
        return blend(x, self.ffn(x), shares[3]), states


def blend(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """(1 - share) x + share y, of any mix of dtypes (torch.lerp wants one)."""
    return x + share * (y - x)


class SqueezeExcite(nn.Module):
    """Channels weighed by a sigmoid of the mean map, through a quarter of them rounded to a multiple of 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(8, int(channels * 0.25 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))


class Halving(nn.Module):
    """(B, C, H, W) -> (B, out, H/2, W/2): inverted residual with squeeze-excite between two added convolutions."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        wide = 4 * out
        self.dwconv1 = ConvNorm(channels, channels, 3, groups=channels)
        self.conv = nn.Sequential(
            ConvNorm(channels, wide, activation=F.relu),
            ConvNorm(wide, wide, 3, stride=2, groups=wide, activation=F.relu),
            SqueezeExcite(wide),
            ConvNorm(wide, out),
        )
        self.dwconv2 = ConvNorm(out, out, 3, groups=out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


class Stage(nn.Module):
    """Blocks of one width, then the halving; also gives the hidden states of the last block."""

    def __init__(self, blocks: list[EfficientViMBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, states = block(x)
        return self.downsample(x), states


class Stem(nn.Module):
    """Image -> (B, width, H/16, W/16) by four strided convolutions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = (channels, width // 8, width // 4, width // 2, width)
        self.conv = nn.Sequential(
            *(ConvNorm(a, b, 3, stride=2, activation=F.relu if b < width else None) for a, b in pairwise(sizes))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def vote(weights: Tensor, heads: nn.ModuleList, means: Sequence[Tensor]) -> Tensor:
    """Scores (B, K): what every head says of its mean (B, C), weighed by a softmax."""
    votes = [head(mean) for head, mean in zip(heads, means, strict=True)]
    return torch.einsum("s,sbk->bk", weights.softmax(0), torch.stack(votes))


class EfficientViM(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W: weighed votes of every stage's states and of the last map.

    In training with distillation the pair of both votes.
    """

    Config = EfficientViMConfig

    def __init__(self, config: EfficientViMConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.patch_embed = Stem(config.in_channels, widths[0])
        after = [*(Halving(a, b) for a, b in pairwise(widths)), nn.Identity()]
        self.stages = nn.ModuleList(
            Stage(
                [
                    EfficientViMBlock(width, states=states, expand=config.expand, mlp_ratio=config.mlp_ratio)
                    for _ in range(depth)
                ],
                down,
            )
            for width, depth, states, down in zip(widths, config.depths, config.states, after, strict=True)
        )
        self.weights = nn.Parameter(torch.ones(len(widths) + 1))
        self.norm = nn.ModuleList([*(BroadcastNorm(width, 1) for width in widths), BroadcastNorm(widths[-1], 2)])
        self.heads = self._heads()
        self.weights_dist = nn.Parameter(torch.ones(len(widths) + 1)) if config.distillation else None
        self.heads_dist = self._heads() if config.distillation else None

    def _heads(self) -> nn.ModuleList:
        widths = self.config.widths
        return nn.ModuleList(nn.Linear(width, self.config.out_channels) for width in (*widths, widths[-1]))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        features = []
        for stage in self.stages:
            x, states = stage(x)
            features.append(states)
        features.append(x)
        means = [norm(feature).flatten(2).mean(dim=2) for norm, feature in zip(self.norm, features, strict=True)]
        scores = vote(self.weights, self.heads, means)
        if self.weights_dist is None or self.heads_dist is None:
            return scores
        both = scores, vote(self.weights_dist, self.heads_dist, means)
        return both if self.training else (both[0] + both[1]) / 2
