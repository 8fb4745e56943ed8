"""Vision Mamba: an image classifier whose blocks scan the patches forwards and backwards.

Letters in this file: B batch, C input channels, L patches, M model width, K classes.
Definition followed: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space
Model" (2024), mixer "v2", class token in the middle. Truth for tests: golden cases vim.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.drop_path import DropPath, drop_rates
from medmamba.layers.mamba import Mamba, MambaConfig, backward


@dataclass(frozen=True, slots=True, kw_only=True)
class VimConfig:
    """Sizes of a Vim. Space is (height, width) in pixels; `average` divides the two directions' sum by two."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1000
    image_px: tuple[int, int] = (224, 224)
    patch_px: int = 16
    stride_px: int = 16
    depth: int = 24
    width: int = 192
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    average: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per axis."""
        high, wide = ((n - self.patch_px) // self.stride_px + 1 for n in self.image_px)
        return high, wide


class PatchEmbedding(nn.Module):
    """Image (B, C, H, W) -> patches in row-major order (B, L, M)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_px, stride=config.stride_px)

    def forward(self, image: Tensor) -> Tensor:
        patches: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return patches


class VimBlock(nn.Module):
    """Add, then norm, then mix: (hidden, residual) -> (mixer(norm(residual + hidden)), residual + hidden)."""

    def __init__(self, config: VimConfig, drop_path: float) -> None:
        super().__init__()
        sizes = MambaConfig(
            d_model=config.width,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            average=config.average,
            layer_scale=config.layer_scale,
        )
        self.mixer = Mamba(sizes, {"": None, "_b": backward})
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        return self.mixer(self.norm(residual)), residual


class Vim(nn.Module):
    """Image (B, C, H, W) of exactly `config.image_px` -> class logits (B, K)."""

    Config = VimConfig

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        if min(config.grid) < 1 or config.depth < 1:
            raise ConfigError(
                f"image {config.image_px} holds no patch of {config.patch_px} px, or depth is 0: {config}"
            )
        tokens = math.prod(config.grid)
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, config.width))
        rates = [0.0, *drop_rates(config.drop_path, config.depth)]
        self.layers = nn.ModuleList(VimBlock(config, rates[number]) for number in range(config.depth))
        self.drop_path = DropPath(rates[-1])
        self.norm_f = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.out_channels) if config.out_channels else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """The published start: small tokens, zero linear biases except the forward step size, scaled out_proj."""
        patch = self.patch_embed.proj
        nn.init.trunc_normal_(patch.weight, std=math.sqrt(1 / patch.weight[0].numel()) / 0.87962566103423978)
        nn.init.zeros_(patch.bias)  # type: ignore[arg-type]
        for tensor in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for name, parameter in self.layers.named_parameters():
            if name.endswith("dt_proj_b.bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter.data.div_(math.sqrt(self.config.depth))

    def forward(self, image: Tensor) -> Tensor:
        wanted = (self.config.in_channels, *self.config.image_px)
        if image.shape[1:] != wanted:
            raise ShapeError(f"Vim wants (B, {', '.join(map(str, wanted))}), got {tuple(image.shape)}")
        patches = self.patch_embed(image)
        middle = patches.shape[1] // 2
        token = self.cls_token.expand(len(image), -1, -1)
        hidden = torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1) + self.pos_embed
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        assert residual is not None
        logits: Tensor = self.head(self.norm_f(residual + self.drop_path(hidden))[:, middle])
        return logits
