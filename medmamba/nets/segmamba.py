"""SegMamba: a 3D U-Net whose encoder scans each stage forwards, backwards and slice by slice.

Letters in this file: B batch, C channels, L voxels of a map in row-major order, K classes.
Definition followed: Xing et al., "SegMamba: Long-range Sequential Modeling Mamba For 3D Medical Image Segmentation"
(MICCAI 2024). Truth for tests: golden case segmamba.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mamba import Mamba, MambaConfig, backward, sliced

SLOPE = 0.01  # of every LeakyReLU
STRIDE = 16  # the smallest map is this much smaller than the image


@dataclass(frozen=True, slots=True, kw_only=True)
class SegMambaConfig:
    """Sizes of a SegMamba; one entry per encoder stage. `slices` are the published 64, 32, 16, 8 for 128^3 inputs."""

    spatial_dims: ClassVar[int] = 3
    in_channels: int = 1
    out_channels: int = 2
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    widths: tuple[int, int, int, int] = (48, 96, 192, 384)
    hidden: int = 768
    slices: tuple[int, int, int, int] = (64, 32, 16, 8)
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2

    def __post_init__(self) -> None:
        if {len(self.depths), len(self.widths), len(self.slices)} != {4}:
            raise ConfigError(f"SegMamba has four stages; depths, widths and slices want four entries, got {self}")


class GatedSpatialConv(nn.Module):
    """x (B, C, *space) + the gated spatial convolution of x; every convolution is followed by norm and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(width, width, 3, padding=1)
        self.proj2 = nn.Conv3d(width, width, 3, padding=1)
        self.proj3 = nn.Conv3d(width, width, 1)
        self.proj4 = nn.Conv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        def step(conv: nn.Module, map_: Tensor) -> Tensor:
            return F.relu(F.instance_norm(conv(map_)))

        return step(self.proj4, step(self.proj2, step(self.proj, x)) + step(self.proj3, x)) + x


class TriMambaLayer(nn.Module):
    """x (B, C, *space) + Mamba(LayerNorm(tokens)) over three orders of the voxels."""

    def __init__(self, width: int, slices: int, config: SegMambaConfig) -> None:
        super().__init__()
        sizes = MambaConfig(d_model=width, d_state=config.d_state, d_conv=config.d_conv, expand=config.expand)
        self.norm = nn.LayerNorm(width)
        self.mamba = Mamba(sizes, {"": None, "_b": backward, "_s": sliced(slices)})

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed: Tensor = self.mamba(self.norm(tokens))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class PointwiseMlp(nn.Module):
    """Two pointwise convolutions with GELU between, C -> 2C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(width, 2 * width, 1)
        self.fc2 = nn.Conv3d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Encoder(nn.Module):
    """Image (B, C, *space) -> four maps at 1/2, 1/4, 1/8, 1/16 of its size."""

    def __init__(self, config: SegMambaConfig) -> None:
        super().__init__()
        widths = config.widths
        stem = nn.Sequential(nn.Conv3d(config.in_channels, widths[0], 7, stride=2, padding=3))
        later = (nn.Sequential(nn.InstanceNorm3d(a), nn.Conv3d(a, b, 2, stride=2)) for a, b in pairwise(widths))
        self.downsample_layers = nn.ModuleList([stem, *later])
        self.gscs = nn.ModuleList(GatedSpatialConv(width) for width in widths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(TriMambaLayer(width, slices, config) for _ in range(depth)))
            for width, slices, depth in zip(widths, config.slices, config.depths)
        )
        self.mlps = nn.ModuleList(PointwiseMlp(width) for width in widths)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = image, []
        for down, gate, stage, mlp in zip(self.downsample_layers, self.gscs, self.stages, self.mlps):
            x = stage(gate(down(x)))
            maps.append(mlp(F.instance_norm(x)))
        return maps


class BareConv(nn.Module):
    """A convolution under the name the published weights give it."""

    def __init__(self, conv: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class ResidualBlock(nn.Module):
    """act(norm(conv2(act(norm(conv1 x)))) + x), x through a normed pointwise convolution where the width changes."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = BareConv(nn.Conv3d(inner, outer, 3, padding=1, bias=False))
        self.conv2 = BareConv(nn.Conv3d(outer, outer, 3, padding=1, bias=False))
        self.conv3 = BareConv(nn.Conv3d(inner, outer, 1, bias=False)) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), SLOPE)
        y = F.instance_norm(self.conv2(y))
        return F.leaky_relu(y + (x if self.conv3 is None else F.instance_norm(self.conv3(x))), SLOPE)


class Unit(nn.Module):
    """A residual block under the name `layer`."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.layer = ResidualBlock(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class UpUnit(nn.Module):
    """Transposed convolution by two, concatenation with the skip, residual block."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.transp_conv = BareConv(nn.ConvTranspose3d(inner, outer, 2, stride=2, bias=False))
        self.conv_block = ResidualBlock(2 * outer, outer)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))
        return out


class Head(nn.Module):
    """Pointwise convolution to the classes, under the published name out.conv.conv."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv = BareConv(nn.Conv3d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class SegMamba(nn.Module):
    """Volume (B, C, z, y, x) -> scores (B, K, z, y, x); the sides are multiples of 16."""

    Config = SegMambaConfig

    def __init__(self, config: SegMambaConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.in_channels, *config.widths, config.hidden)
        self.vit = Encoder(config)
        self.encoder1 = Unit(config.in_channels, config.widths[0])
        for number in range(2, 6):
            self.add_module(f"encoder{number}", Unit(widths[number - 1], widths[number]))
        for number in range(5, 1, -1):
            self.add_module(f"decoder{number}", UpUnit(widths[number], widths[number - 1]))
        self.decoder1 = Unit(config.widths[0], config.widths[0])
        self.out = Head(config.widths[0], config.out_channels)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 5 or any(n % STRIDE or n == 0 for n in image.shape[2:]):
            raise ShapeError(
                f"SegMamba wants (B, C, z, y, x) with sides a multiple of {STRIDE}, got {tuple(image.shape)}"
            )
        maps = [image, *self.vit(image)]
        skips = [self.get_submodule(f"encoder{number + 1}")(map_) for number, map_ in enumerate(maps)]
        x = skips[-1]
        for number in range(5, 1, -1):
            x = self.get_submodule(f"decoder{number}")(x, skips[number - 2])
        scores: Tensor = self.out(self.decoder1(x))
        return scores
