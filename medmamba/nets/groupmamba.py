"""GroupMamba: channels in four groups, one scan direction each, modulated by the input; a classifier.

Letters: B batch, C channels, D inner channels, H, W the map, L = H * W, K classes.
Definition followed: "GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model" and its released
models. Parameter names are the official ones. Truth for tests: golden cases `groupmamba`. The gradient is the true
adjoint of the column scans, also on maps that are not square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.squeeze import maybe_empty_linear
from medmamba.layers.ss2d import CROSS, ChannelLinear, ChannelNorm, ScanParameters, depthwise, initial_weights

GROUPS = 4  # row-major, column-major, and both reversed in time
REDUCTION = 16  # of the channels in the affinity


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMambaConfig:
    """Defaults: the released tiny network. `distillation` adds the second head; in evaluation the two are averaged."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    stem: int = 32
    widths: tuple[int, ...] = (64, 128, 348, 448)
    depths: tuple[int, ...] = (3, 4, 9, 3)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    state: int = 1
    expand: float = 1
    distillation: bool = False

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.mlp_ratios):
            raise ConfigError(f"widths {self.widths}, depths {self.depths}, mlp_ratios {self.mlp_ratios}: one a stage")


class DirectionalSS2D(ScanParameters):
    """A gated scan of a map (B, C, H, W) in one direction: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed."""

    def __init__(self, channels: int, direction: int, *, state: int = 1, expand: float = 1, conv: int = 3) -> None:
        inner = int(expand * channels)
        super().__init__(channels=channels, inner=inner, directions=1, state=state)
        self.directions = CROSS[direction : direction + 1]
        self.out_norm = ChannelNorm(inner)
        self.in_proj = ChannelLinear(channels, 2 * inner, bias=False)
        self.conv2d = depthwise(inner, conv)
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=1)
        y = self.scan_map(F.silu(self.conv2d(x)), self.directions)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class GroupMambaLayer(nn.Module):
    """The modulated group layer (B, C, H, W) -> (B, out, H, W)."""

    def __init__(
        self, channels: int, out: int | None = None, *, state: int = 1, expand: float = 1, conv: int = 3
    ) -> None:
        super().__init__()
        if channels % GROUPS:
            raise ConfigError(f"{channels} channels: the layer wants a multiple of {GROUPS}")
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.fc1 = maybe_empty_linear(channels, channels // REDUCTION)
        self.fc2 = maybe_empty_linear(channels // REDUCTION, channels)
        self.norm = ChannelNorm(channels)
        for direction in range(GROUPS):
            part = DirectionalSS2D(channels // GROUPS, direction, state=state, expand=expand, conv=conv)
            self.add_module(f"mamba_g{direction + 1}", part)
        self.proj = ChannelLinear(channels, channels if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        affinity = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))
        parts = [self.get_submodule(f"mamba_g{g + 1}")(part) for g, part in enumerate(x.chunk(GROUPS, dim=1))]
        y = torch.cat(parts, dim=1) * self.skip_scale * x * affinity[:, :, None, None]
        return self.proj(self.norm(y))


class DepthwiseMap(nn.Module):
    """A depthwise 3 x 3 convolution under the official name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class FeedForward(nn.Module):
    """fc1, a depthwise convolution unless `conv=False`, exact GELU, fc2."""

    def __init__(self, channels: int, hidden: int, *, conv: bool = True) -> None:
        super().__init__()
        self.fc1 = ChannelLinear(channels, hidden)
        self.dwconv = DepthwiseMap(hidden) if conv else nn.Identity()
        self.fc2 = ChannelLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """x + layer(x), then x + FFN(norm2(x)). Maps (B, C, H, W)."""

    def __init__(self, channels: int, *, mlp_ratio: float, state: int = 1, expand: float = 1) -> None:
        super().__init__()
        self.norm2 = ChannelNorm(channels, eps=1e-6)
        self.attn = GroupMambaLayer(channels, state=state, expand=expand)
        self.mlp = FeedForward(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class ClassBlock(nn.Module):
    """The same for the class token, a map of one pixel (B, C, 1, 1): norm behind the layer, no convolution."""

    def __init__(self, channels: int, *, mlp_ratio: float, state: int = 1, expand: float = 1) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels, eps=1e-6)
        self.norm2 = ChannelNorm(channels, eps=1e-6)
        self.attn = GroupMambaLayer(channels, state=state, expand=expand)
        self.mlp = FeedForward(channels, int(channels * mlp_ratio), conv=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """Image (B, C, H, W) -> (B, width, H/4, W/4)."""

    def __init__(self, channels: int, hidden: int, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for size, stride, source in ((7, 2, channels), (3, 1, hidden), (3, 1, hidden)):
            convolution = nn.Conv2d(source, hidden, size, stride, size // 2, bias=False)
            parts += [convolution, nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*parts)
        self.proj = nn.Conv2d(hidden, width, 3, 2, 1)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)))


class Halving(nn.Module):
    """(B, C, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, out, 3, 2, 1)
        self.norm = ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class GroupMamba(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W; in training with distillation the pair of both heads."""

    Config = GroupMambaConfig

    def __init__(self, config: GroupMambaConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        shared: dict[str, Any] = {"state": config.state, "expand": config.expand}
        for level, (width, depth, ratio) in enumerate(zip(widths, config.depths, config.mlp_ratios, strict=True), 1):
            entry = Halving(widths[level - 2], width) if level > 1 else Stem(config.in_channels, config.stem, width)
            self.add_module(f"patch_embed{level}", entry)
            self.add_module(
                f"block{level}", nn.Sequential(*(Block(width, mlp_ratio=ratio, **shared) for _ in range(depth)))
            )
            self.add_module(f"norm{level}", ChannelNorm(width, eps=1e-6))
        self.post_network = nn.Sequential(ClassBlock(widths[-1], mlp_ratio=config.mlp_ratios[-1], **shared))
        self.head = nn.Linear(widths[-1], config.out_channels)
        self.dist_head = nn.Linear(widths[-1], config.out_channels) if config.distillation else None
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        last = len(self.config.widths)
        part: Callable[[str], nn.Module] = self.get_submodule
        for level in range(1, last + 1):
            x = part(f"block{level}")(part(f"patch_embed{level}")(x))
            if level < last:
                x = part(f"norm{level}")(x)
        token = part(f"norm{last}")(self.post_network(x.mean(dim=(2, 3), keepdim=True))).flatten(1)
        if self.dist_head is None:
            return self.head(token)
        both = (self.head(token), self.dist_head(token))
        return both if self.training else (both[0] + both[1]) / 2
