"""Attention Swin U-Net: a windowed-attention U-Net whose skips are joined through summary tokens.

Letters in this file: B batch, L tokens, C channels, K classes, e width of the first stage, h, w token axes.
Definition followed: Aghdam et al., "Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion
Segmentation" (2022). The re-use of encoder attention in the decoder, told by the paper, has no effect in the published
code and is not here. Truth for tests: golden case attswinunet.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.nd import channels_first
from medmamba.layers.patches import PatchEmbed, PatchExpand, pad_image
from medmamba.layers.ss2d import PatchMerging as MapMerging
from medmamba.layers.swin import SwinStage

PATCH = 4  # pixels
UNUSED = re.compile(r"patch_embed\.|decoder\.norm\.|.*\.(relative_position_index|attn_mask)$")
SKIPS = ("linear", "linear_twice", "cross")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttSwinUNetConfig:
    """Sizes, one entry per stage; a window larger than the map of `image_px` is shrunk to it. Any image size works.

    `skip` says how skips are joined: concatenation and a linear layer, the same layer a second time, or, at the
    `cross_levels` deepest decoder levels, cross attention before it.
    """

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 9
    image_px: tuple[int, int] = (224, 224)
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    skip: str = "cross"
    cross_levels: int = 3
    cross_depth: int = 2
    cross_heads: int = 8
    cross_head_width: int = 64

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads) or len(self.depths) < 2:
            raise ConfigError(f"wanted as many depths as heads, two or more, got {self.depths} and {self.heads}")
        if self.skip not in SKIPS:
            raise ConfigError(f"skip is one of {', '.join(SKIPS)}, got {self.skip!r}")
        if min(self.image_px) < self.multiple:
            raise ConfigError(f"image_px must be {self.multiple} or more, got {self.image_px}")

    @property
    def multiple(self) -> int:
        """Images are padded with zeros at the far ends up to a multiple of this, and the scores cropped."""
        return int(PATCH * 2 ** (len(self.depths) - 1))

    def stage(self, level: int, *, down: nn.Module | None = None, up: nn.Module | None = None) -> SwinStage:
        """The blocks of one resolution; encoder and decoder have the same."""
        return SwinStage(
            self.width * 2**level,
            self.depths[level],
            self.heads[level],
            window=self.window,
            side_px=min(self.image_px) // (PATCH * 2**level),
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            down=down,
            up=up,
        )


class PatchMerging(MapMerging):
    """(B, h, w, C) -> (B, ceil(h/2), ceil(w/2), 2C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Encoder(nn.Module):
    """Image (B, C, H, W) -> the normed bottleneck and what entered every stage, finest first."""

    def __init__(self, config: AttSwinUNetConfig) -> None:
        super().__init__()
        last = len(config.depths) - 1
        widths = [config.width * 2**level for level in range(last + 1)]
        self.patch_embed = PatchEmbed(config.in_channels, config.width, (PATCH, PATCH))
        self.layers = nn.ModuleList(
            config.stage(level, down=PatchMerging(width, 2 * width) if level < last else None)
            for level, width in enumerate(widths)
        )
        self.norm = nn.LayerNorm(widths[-1])

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, entered = self.patch_embed(image), []
        for stage in self.layers:
            entered.append(x)
            x = stage(x)
        return self.norm(x), entered


class SummaryAttention(nn.Module):
    """Summary tokens (B, 1, C), already normed, look at themselves and at the other side's tokens (B, L, C)."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width))

    def forward(self, summary: Tensor, others: Tensor) -> Tensor:
        seen = torch.cat([summary, others], dim=1)
        parts = [self.to_q(summary), *self.to_kv(seen).chunk(2, dim=-1)]
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.to_out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))
        return out


class PreNorm(nn.Module):
    """Only the first argument is normed, as published."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x), others)
        return out


class Wrapped(nn.Module):
    """A module under the name `fn`, as published."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        out: Tensor = self.fn(x, others)
        return out


class CrossSkip(nn.Module):
    """Two token rows (B, L, C): the first token of each gives way to a summary that has looked at the other row."""

    def __init__(self, width: int, config: AttSwinUNetConfig) -> None:
        super().__init__()

        def looking() -> Wrapped:
            return Wrapped(PreNorm(width, SummaryAttention(width, config.cross_heads, config.cross_head_width)))

        self.layers = nn.ModuleList(nn.ModuleList([looking(), looking()]) for _ in range(config.cross_depth))

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        small_sum, large_sum = (row.mean(dim=1, keepdim=True) for row in (small, large))
        for layer in range(len(self.layers)):
            small_sum = small_sum + self.get_submodule(f"layers.{layer}.0")(small_sum, large[:, 1:])
            large_sum = large_sum + self.get_submodule(f"layers.{layer}.1")(large_sum, small[:, 1:])
        return torch.cat([small_sum, small[:, 1:]], dim=1), torch.cat([large_sum, large[:, 1:]], dim=1)


class Decoder(nn.Module):
    """Bottleneck and skips -> scores (B, K, H, W)."""

    def __init__(self, config: AttSwinUNetConfig) -> None:
        super().__init__()
        self.repeat = 2 if config.skip == "linear_twice" else 1
        last = len(config.depths) - 1
        widths = [config.width * 2**level for level in range(last + 1)]
        down_to_finest = range(last - 1, -1, -1)
        ups = {level: PatchExpand(widths[level], widths[level - 1], (2, 2)) for level in range(1, last + 1)}
        decoder = [config.stage(level, up=ups.get(level)) for level in down_to_finest]
        self.layers_up = nn.ModuleList([ups[last], *decoder])
        joins = (nn.Linear(2 * widths[level], widths[level]) for level in down_to_finest)
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *joins])
        crossed = list(down_to_finest)[: config.cross_levels] if config.skip == "cross" else []
        self.Crossvit_layer = nn.ModuleDict({str(level): CrossSkip(widths[level], config) for level in crossed})
        self.norm_up = nn.LayerNorm(config.width)
        self.up = PatchExpand(config.width, config.width, (PATCH, PATCH))
        self.output = nn.Conv2d(config.width, config.out_channels, 1, bias=False)

    def forward(self, x: Tensor, entered: list[Tensor]) -> Tensor:
        x = self.layers_up[0](x)
        for level in range(len(entered) - 2, -1, -1):
            number = len(entered) - 1 - level
            x = self.layers_up[number](self.join(level, number, x, entered[level]))
        scores: Tensor = self.output(channels_first(self.up(self.norm_up(x))))
        return scores

    def join(self, level: int, number: int, x: Tensor, skip: Tensor) -> Tensor:
        """The decoder's map and the encoder's, (B, h, w, C) both, as one."""
        if str(level) in self.Crossvit_layer:
            crossed = self.Crossvit_layer[str(level)](x.flatten(1, 2), skip.flatten(1, 2))
            x, skip = (row.reshape(x.shape) for row in crossed)
        for _ in range(self.repeat):
            x = self.concat_back_dim[number](torch.cat([x, skip], dim=-1))
        return x


class AttSwinUNet(nn.Module):
    """Image (B, C, H, W) of any size -> scores (B, K, H, W)."""

    Config = AttSwinUNetConfig

    def __init__(self, config: AttSwinUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @staticmethod
    def own_name(official: str) -> str | None:
        """Published files hold a second patch embedding and a norm that are never used, and fixed tables and masks."""
        return None if UNUSED.match(official) else official

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4:
            raise ShapeError(f"Attention Swin U-Net wants (B, C, H, W), got {tuple(image.shape)}")
        height, width = image.shape[2:]
        scores: Tensor = self.decoder(*self.encoder(pad_image(image, (self.config.multiple,) * 2)))
        return scores[..., :height, :width]
