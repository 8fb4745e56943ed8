"""DAF: four backbone maps refined twice by position and channel attention that a shared autoencoder guides.

Letters in this file: B batch, C channels, K classes, w the working width, H, W the image.
Definition followed: Sinha, Dolz, "Multi-scale self-guided attention for medical image segmentation" (2020). Levels are
1 (finest, a quarter of the image) to 4. Truth for tests: golden case daf (all that follows the backbone; the backbone
itself, a ResNeXt-101 32x4d, has no case).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.map_attention import ChannelAttention, PositionAttention
from medmamba.layers.resnet import ResNeXt

LEVELS = (4, 3, 2, 1)  # coarse to fine; the order in which guiding convolutions are numbered 1..4
UNUSED = re.compile(r"(conv6_|conv7_|attention\d\.|refine\d\.)")  # in published files, never used by the network
SEMANTIC_WEIGHT, RECONSTRUCTION_WEIGHT = 0.25, 0.1  # of the training loss
SMALLEST = 13  # pixels: the finest map keeps four positions, enough to be halved twice


@dataclass(frozen=True, slots=True, kw_only=True)
class DAFConfig:
    """Sizes: the working width, and widths, blocks and groups of the backbone (as published: ResNeXt-101 32x4d)."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 5
    width: int = 64
    stem: int = 64
    backbone_widths: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    backbone_blocks: tuple[int, int, int, int] = (3, 4, 23, 3)
    groups: int = 32

    def __post_init__(self) -> None:
        if {len(self.backbone_widths), len(self.backbone_blocks)} != {4}:
            raise ConfigError(f"DAF reads four backbone maps; widths and blocks want four entries, got {self}")


@dataclass(kw_only=True)
class DAFMaps:
    """All that the head computes, in the order of `LEVELS`; scores (B, K, H, W) at the size of the image."""

    first: list[Tensor] = field(default_factory=list)
    refined: list[Tensor] = field(default_factory=list)
    vectors: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    seen: list[Tensor] = field(default_factory=list)
    rebuilt: list[Tensor] = field(default_factory=list)

    @property
    def scores(self) -> Tensor:
        """The result: the mean of the refined scores."""
        return torch.stack(self.refined[::-1]).sum(dim=0) / len(self.refined)

    def semantic_loss(self) -> Tensor:
        """How far the guiding vectors of the two passes are apart."""
        return torch.stack([F.mse_loss(a, b) for a, b in zip(*self.vectors, strict=True)]).sum()

    def reconstruction_loss(self) -> Tensor:
        """How far the autoencoders' results are from what they were given."""
        return torch.stack([F.mse_loss(a, b) for a, b in zip(self.seen, self.rebuilt, strict=True)]).sum()

    def loss(self, target: Tensor) -> Tensor:
        """The published training loss for class numbers (B, H, W)."""
        scored = torch.stack([F.cross_entropy(scores, target) for scores in self.first + self.refined]).sum()
        guided = SEMANTIC_WEIGHT * self.semantic_loss() + RECONSTRUCTION_WEIGHT * self.reconstruction_loss()
        return scored + guided


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def conv_steps(inner: int, outer: int, kernel: int) -> list[nn.Module]:
    """Convolution, batch norm, PReLU with one slope."""
    return [nn.Conv2d(inner, outer, kernel, padding=kernel // 2), nn.BatchNorm2d(outer), nn.PReLU()]


def double_conv(inner: int, outer: int) -> list[nn.Module]:
    """Twice: convolution 3 x 3, batch norm, ReLU."""
    first = [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return [*first, nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]


class Named(nn.Module):
    """Steps one after the other under the name the published weights give the row."""

    def __init__(self, name: str, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.row = name
        self.add_module(name, nn.Sequential(*steps))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self.row)(x)
        return out


class SemanticModule(nn.Module):
    """Autoencoder of (B, n, H, W): a flat vector over the whole batch, and what is rebuilt from it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc1 = Named("encode", [*double_conv(width, 2 * width), nn.MaxPool2d(2)])
        self.enc2 = Named("encode", [*double_conv(2 * width, 4 * width), nn.MaxPool2d(2)])
        self.dec2 = Named(
            "decode", [*double_conv(4 * width, 2 * width), nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)]
        )
        self.dec1 = Named("decode", [*double_conv(2 * width, width), nn.ConvTranspose2d(width, width, 2, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.enc1(x)
        quarter = self.enc2(half)
        rebuilt = resize(self.dec1(resize(self.dec2(quarter), half.shape[2:])), x.shape[2:])
        return quarter.flatten(), rebuilt


def attention_layer(width: int, attention: nn.Module) -> Named:
    """2w channels -> w, attention, w."""
    return Named("attn", [*conv_steps(2 * width, width, 3), attention, *conv_steps(width, width, 3)])


class DAFHead(nn.Module):
    """Four backbone maps, finest first -> `DAFMaps`."""

    def __init__(self, config: DAFConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        for level in LEVELS:
            self.add_module(f"down{level}", nn.Sequential(*conv_steps(config.backbone_widths[level - 1], width, 1)))
            self.add_module(f"predict{level}", nn.Conv2d(width, config.out_channels, 1))
            self.add_module(f"predict{level}_2", nn.Conv2d(width, config.out_channels, 1))
        fusing = [*conv_steps(4 * width, width, 3), *conv_steps(width, width, 3), *conv_steps(width, width, 1)]
        self.fuse1 = Named("fuse_attn", fusing)
        for turn in (1, 2):
            self.add_module(f"semanticModule_{turn}_1", SemanticModule(2 * width))
            for number in range(1, 5):
                self.add_module(f"pam_attention_{turn}_{number}", attention_layer(width, PositionAttention(width)))
                self.add_module(f"cam_attention_{turn}_{number}", attention_layer(width, ChannelAttention()))
                self.add_module(f"conv_sem_{turn}_{number}", nn.Conv2d(2 * width, width, 3, padding=1))
                self.add_module(f"conv8_{'1' * (turn - 1)}{number}", nn.Conv2d(width, width, 1))

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> DAFMaps:
        finest = maps[0].shape[2:]
        down = {level: resize(self.part("down{}", level)(maps[level - 1]), finest) for level in LEVELS}
        fused = self.fuse1(torch.cat([down[level] for level in LEVELS], dim=1))
        result = DAFMaps()
        for level in LEVELS:
            attended = self.attend(1, level, torch.cat([down[level], fused], dim=1), result)
            refined = self.attend(2, level, torch.cat([down[level], attended * fused], dim=1), result)
            result.first.append(resize(self.part("predict{}", level)(down[level]), size))
            result.refined.append(resize(self.part("predict{}_2", level)(refined), size))
        return result

    def attend(self, turn: int, level: int, x: Tensor, result: DAFMaps) -> Tensor:
        """(B, 2w, h, w) -> (B, w, h, w): both attentions, weighed by what the autoencoder made of x."""
        number = 5 - level
        vector, rebuilt = self.part("semanticModule_{}_1", turn)(x)
        result.vectors[turn - 1].append(vector)
        result.seen.append(x)
        result.rebuilt.append(rebuilt)
        attended = self.part("cam_attention_{}_{}", turn, level)(x) + self.part("pam_attention_{}_{}", turn, level)(x)
        guided = attended * self.part("conv_sem_{}_{}", turn, number)(rebuilt)
        out: Tensor = self.part("conv8_{}{}", "1" * (turn - 1), number)(guided)
        return out

    def part(self, name: str, *numbers: object) -> nn.Module:
        return self.get_submodule(name.format(*numbers))


class DAF(DAFHead):
    """Image (B, C, H, W) -> scores (B, K, H, W), any size from 13 pixels; `maps` gives all that the loss needs."""

    Config = DAFConfig

    def __init__(self, config: DAFConfig) -> None:
        super().__init__(config)
        self.resnext = ResNeXt(
            config.in_channels,
            stem=config.stem,
            widths=config.backbone_widths,
            blocks=config.backbone_blocks,
            groups=config.groups,
        )

    @staticmethod
    def own_name(official: str) -> str | None:
        """Published files hold layers that the network never uses."""
        return None if UNUSED.match(official) else official

    def maps(self, image: Tensor) -> DAFMaps:
        if image.ndim != 4 or min(image.shape[2:]) < SMALLEST:
            raise ShapeError(f"DAF wants (B, C, H, W) with sides of {SMALLEST} or more, got {tuple(image.shape)}")
        return super().forward(self.resnext(image), image.shape[2:])

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return self.maps(image).scores
