"""VMamba: four-direction selective scan on a pyramid of maps, a classifier (B, C, H, W) -> (B, K).

Letters: B batch, C channels, H, W the map, K classes.
Definition followed: "VMamba: Visual State Space Model" (Liu et al.), released form v05 with patch embedding v2 and
downsampling v3. Parameter names are the official ones. Truth for tests: golden cases `vmamba`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.drop_path import DropPath
from medmamba.layers.ss2d import SS2D, ChannelMlp, ChannelNorm, ClassHead, Stage, initial_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class VMambaConfig:
    """Defaults: the released tiny network. `gate` adds the SiLU gate ("v05"), without it "v05_noz"."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    depths: tuple[int, ...] = (2, 2, 8, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    state: int = 1
    ratio: float = 1.0
    dt_rank: int | None = None
    conv: int = 3
    conv_bias: bool = False
    gate: bool = False
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ConfigError(f"depths {self.depths} and widths {self.widths}: one of each for every stage")
        if self.patch < 2 or self.patch % 2:
            raise ConfigError(f"patch={self.patch}: two strided convolutions make it, so it must be even")


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm2(x)) unless `mlp_ratio` is 0. Maps (B, C, H, W).

    `drop_path` leaves out either branch of a sample with that probability while training.
    """

    def __init__(self, channels: int, op: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.op = op
        self.drop = DropPath(drop_path)
        self.mlp_ratio = mlp_ratio
        if mlp_ratio > 0:
            self.norm2 = ChannelNorm(channels)
            self.mlp = ChannelMlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.op(self.norm(x)))
        return x + self.drop(self.mlp(self.norm2(x))) if self.mlp_ratio > 0 else x


class VMamba(nn.Module):
    """The classifier (B, C, H, W) -> (B, K), any H and W."""

    Config = VMambaConfig

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = patch_embedding(config)
        pairs = list(pairwise(config.widths))
        down = [*(downsampling(a, b) for a, b in pairs), None]
        self.layers = nn.ModuleList(
            Stage([block(config, width) for _ in range(depth)], after)
            for depth, width, after in zip(config.depths, config.widths, down, strict=True)
        )
        self.classifier = ClassHead(config.widths[-1], config.out_channels)
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def block(config: VMambaConfig, width: int, *, drop_path: float = 0.0) -> VSSBlock:
    """One VSS block of the given width."""
    op = SS2D(
        width,
        state=config.state,
        ratio=config.ratio,
        dt_rank=config.dt_rank,
        conv=config.conv,
        conv_bias=config.conv_bias,
        gate=config.gate,
    )
    return VSSBlock(width, op, mlp_ratio=config.mlp_ratio, drop_path=drop_path)


def patch_embedding(config: VMambaConfig) -> nn.Sequential:
    """Two overlapping convolutions, each of stride patch / 2. The empty places keep the official numbering."""
    stride, width = config.patch // 2, config.widths[0]
    size = stride + 1
    return nn.Sequential(
        nn.Conv2d(config.in_channels, width // 2, size, stride, 1),
        nn.Identity(),
        ChannelNorm(width // 2),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(width // 2, width, size, stride, 1),
        nn.Identity(),
        ChannelNorm(width),
    )


def downsampling(channels: int, out: int) -> nn.Sequential:
    """3 x 3 convolution of stride 2 and norm (v3)."""
    return nn.Sequential(nn.Identity(), nn.Conv2d(channels, out, 3, 2, 1), nn.Identity(), ChannelNorm(out))
