"""ViG's mixer: bidirectional gated linear attention with a local convolution branch and a gate between the two.

Letters in this file: B batch, L patches in row-major order, C channels, H heads of key width K and value width V.
Definition followed: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (AAAI
2025). Parameter names are those of the published weights. Truth: golden vig.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.gla import gla_bidirectional


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedLinearAttentionConfig:
    """Sizes of the mixer. Log gates are logsigmoid / `gate_divisor`, not below `gate_floor` when given.

    `local_activation` is the SiLU after the local convolution, `out_activation` one before the output projection.
    The local branch is split in heads of the value width, so expand_value * d_model must be d_model.
    """

    d_model: int
    heads: int
    expand_key: float = 0.5
    expand_value: float = 1.0
    gate_divisor: float = 16
    gate_rank: int = 16
    gate_floor: float | None = None
    local_activation: bool = True
    local_bias: bool = False
    out_activation: bool = False

    def __post_init__(self) -> None:
        if self.value_width != self.d_model or self.d_model % self.heads or self.key_width % self.heads:
            raise ConfigError(
                f"key width {self.key_width} and value width {self.value_width} must be multiples of {self.heads} "
                f"heads, and the value width equal to d_model {self.d_model}"
            )

    @property
    def key_width(self) -> int:
        return int(self.expand_key * self.d_model)

    @property
    def value_width(self) -> int:
        return int(self.expand_value * self.d_model)


class GatedLinearAttention(nn.Module):
    """Patches (B, L, C) of a map of `space` (height, width) -> (B, L, C)."""

    def __init__(self, config: GatedLinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        width, keys, values = config.d_model, config.key_width, config.value_width
        local = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=config.local_bias)
        self.in_proj = nn.Sequential(local, nn.SiLU() if config.local_activation else nn.Identity())
        self.qkv_proj = nn.Linear(width, 2 * keys + values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, 2 * keys)
        )
        self.g_proj = nn.Linear(width, values)
        self.g_norm = nn.RMSNorm(values // config.heads, eps=1e-5)
        self.l_norm = nn.RMSNorm(values // config.heads, eps=1e-5)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, patches: Tensor, space: tuple[int, int]) -> Tensor:
        config = self.config
        if patches.ndim != 3 or patches.shape[1:] != (space[0] * space[1], config.d_model):
            raise ShapeError(f"wanted (B, {space[0] * space[1]}, {config.d_model}), got {tuple(patches.shape)}")
        map_ = patches.transpose(1, 2).unflatten(2, space)
        local: Tensor = self.in_proj(map_).flatten(2).transpose(1, 2)
        q, k, v = self.qkv_proj(local).split([config.key_width, config.key_width, config.value_width], dim=-1)
        gates = F.logsigmoid(self.gk_proj(local)) / config.gate_divisor
        if config.gate_floor is not None:
            gates = gates.clamp(min=config.gate_floor)
        q, k, v, ahead, back = (self._heads(part) for part in (q, k, v, *gates.chunk(2, dim=-1)))
        mixed = gla_bidirectional(q * q.shape[-1] ** -0.5, k, v, ahead, back)
        mixed = self.g_norm(mixed).transpose(1, 2).flatten(2)
        beside = self.l_norm(local.unflatten(-1, (config.heads, -1))).flatten(2)
        out = torch.lerp(beside, mixed, torch.sigmoid(self.g_proj(local)))
        projected: Tensor = self.o_proj(F.silu(out) if config.out_activation else out)
        return projected

    def _heads(self, part: Tensor) -> Tensor:
        """(B, L, H * w) -> (B, H, L, w)."""
        return part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
