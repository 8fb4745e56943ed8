"""HER-Seg: an image encoder of gated linear attention with rotary positions, and a Segment-Anything mask decoder.

Letters in this file: B batch, C channels, L tokens in row-major order, S, T rows and columns of tokens, h heads.
Definition followed: Xu et al., "HER-Seg: Holistically Efficient Segmentation for High-Resolution Medical Images"
(2025), class LGViT. Linear in L. Truth for tests: golden case herseg (the encoder). The mask decoder has no case: of it
is known that it is of the Segment-Anything kind, two-way transformer, 256 wide; what else it needs is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.attention import TokenMlp
from medmamba.layers.patches import pad_image
from medmamba.layers.ss2d import ChannelNorm
from medmamba.layers.two_way import MaskDecoder

BASE = 10000.0  # of the rotary frequencies
TINY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class HERSegConfig:
    """Sizes; the first of `depths` counts convolutional blocks, the others attention blocks with their `heads`.

    `decoder_*` are the mask decoder's.
    """

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1
    width: int = 192
    patch_px: int = 16
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 3, 6, 6)
    mlp_ratio: float = 2.0
    decoder_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_hidden: int = 2048

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads):
            raise ConfigError(f"wanted one head count per depth, got {self.depths} and {self.heads}")
        if self.width % 4 or any(self.width % heads for heads in self.heads[1:]):
            raise ConfigError(f"width must be a multiple of 4 (rotary) and of every head count, got {self}")


def rotations(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Angles (L, C / 2) in radians: row times each of C / 4 frequencies, then column times each."""
    kept = torch.float64 if like.dtype == torch.float64 else torch.float32
    count = width // 4
    theta = BASE ** (-torch.arange(count, device=like.device, dtype=kept) / count)
    row, column = (torch.arange(n, device=like.device, dtype=kept)[:, None] * theta for n in (rows, columns))
    both = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs of channels (2j, 2j + 1) of (B, L, C), read as complex numbers, by `angles` (L, C / 2)."""
    real, imaginary = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm under their published names."""

    def __init__(self, inner: int, outer: int, size: int = 1, *, groups: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.c(x))
        return out


class MBConv(nn.Module):
    """Inverted bottleneck on a map (B, C, S, T): widen, depthwise 3 x 3, narrow, residual, GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class LinearAttention(nn.Module):
    """Tokens (B, L, C) -> (B, L, C) in time linear in L, for a grid of `space` = (S, T) tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 2 * width)
        self.lepe = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up_proj = nn.Linear(width, width // 4)
        self.down_proj = nn.Linear(width // 4, width)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, h, L, C / h)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, space: tuple[int, int]) -> Tensor:
        count = x.shape[1]
        queries, keys = (F.elu(part) + 1 for part in self.qk(x).chunk(2, dim=-1))
        values = self.down_proj(F.silu(self.up_proj(x)))
        angles = rotations(*space, x.shape[-1], x)
        turned_queries, turned_keys = self.split(rotate(queries, angles)), self.split(rotate(keys, angles))
        total = self.split(queries) @ self.split(keys).mean(dim=-2, keepdim=True).mT + TINY
        memory = (turned_keys * count**-0.5).mT @ (self.split(values) * count**-0.5)
        mixed = (turned_queries @ memory / total).transpose(1, 2).flatten(2)
        near = self.lepe(values.mT.unflatten(-1, space)).flatten(2).mT
        return mixed + near


class LGViTBlock(nn.Module):
    """Gated linear attention and perceptron on a map (B, C, S, T), both residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.act_proj = nn.Linear(width, width)
        self.attn = LinearAttention(width, heads)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, hidden)

    def forward(self, map_: Tensor) -> Tensor:
        space = (map_.shape[2], map_.shape[3])
        x = map_.flatten(2).mT
        normed = self.norm1(x)
        x = x + self.out_proj(self.attn(normed, space) * F.silu(self.act_proj(normed)))
        x = x + self.mlp(self.norm2(x))
        return x.mT.reshape(map_.shape)


class Row(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) -> map (B, width, H / patch, W / patch)."""

    def __init__(self, in_channels: int, width: int, patch_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_px, patch_px)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.proj(image)
        return out


class HERSegEncoder(nn.Module):
    """Image (B, C, H, W) -> features (B, width, H / patch, W / patch); sides are multiples of the patch."""

    Config = HERSegConfig

    def __init__(self, config: HERSegConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.patch_embed = PatchEmbed(config.in_channels, width, config.patch_px)
        rows = [Row(*(MBConv(width, hidden) for _ in range(config.depths[0])))]
        for depth, heads in zip(config.depths[1:], config.heads[1:]):
            rows.append(Row(*(LGViTBlock(width, heads, hidden) for _ in range(depth))))
        self.layers = nn.Sequential(*rows)

    @staticmethod
    def own_name(official: str) -> str | None:
        """Published files hold the rotary table of one image size; ours is computed for the size at hand."""
        return None if official.endswith("rope.rotations") else official

    def forward(self, image: Tensor) -> Tensor:
        patch = self.config.patch_px
        if image.ndim != 4 or any(n % patch or n == 0 for n in image.shape[2:]):
            raise ShapeError(f"HER-Seg wants (B, C, H, W) with sides a multiple of {patch}, got {tuple(image.shape)}")
        features: Tensor = self.layers(self.patch_embed(image))
        return features


class HERSeg(nn.Module):
    """Image (B, C, H, W) of any size -> scores (B, K, H, W): encoder, neck, mask decoder, bilinear to full size."""

    Config = HERSegConfig

    def __init__(self, config: HERSegConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.decoder_width
        self.image_encoder = HERSegEncoder(config)
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, inner, 1, bias=False),
            ChannelNorm(inner, eps=1e-6),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            ChannelNorm(inner, eps=1e-6),
        )
        self.mask_decoder = MaskDecoder(
            inner,
            config.out_channels,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            hidden=config.decoder_hidden,
        )

    @staticmethod
    def own_name(official: str) -> str | None:
        return HERSegEncoder.own_name(official)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4:
            raise ShapeError(f"HER-Seg wants (B, C, H, W), got {tuple(image.shape)}")
        height, width = image.shape[2:]
        padded = pad_image(image, (self.config.patch_px,) * 2)
        scores = self.mask_decoder(self.neck(self.image_encoder(padded)))
        full = F.interpolate(scores, padded.shape[2:], mode="bilinear", align_corners=False)
        return full[..., :height, :width]
