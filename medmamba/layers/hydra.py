"""The Hydra block: a quasiseparable mixer, so that every token reads both sides with its own diagonal.

Letters in this file: B batch, L tokens, M model width, D inner width, H heads of width P, G groups of N states.
Definition followed: Hwang et al., "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (2024).
Parameter names are those of the published weights. Truth: golden hydra.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.mamba2 import Mamba2Config
from medmamba.layers.norms import GatedRMSNorm
from medmamba.ops.ssd import quasiseparable


def hydra_config(d_model: int, **sizes: object) -> Mamba2Config:
    """The published sizes of a Hydra block, changed by `sizes` (fields of Mamba2Config)."""
    start = Mamba2Config(d_model=d_model, head_width=1, d_conv=7, norm_before_gate=True)
    return replace(start, **{"head_width": 64, **sizes})  # type: ignore[arg-type]


class Hydra(nn.Module):
    """Tokens (B, L, M) -> (B, L, M), both directions with one decay and one step bias per head."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        if config.d_conv % 2 == 0:
            raise ConfigError(f"the convolution of Hydra is centred: d_conv must be odd, got {config.d_conv}")
        self.config = config
        inner, heads = config.d_inner, config.heads
        mixed = inner + 4 * config.groups * config.d_state
        self.in_proj = nn.Linear(config.d_model, inner + mixed + 2 * heads, bias=config.bias)
        self.conv1d = nn.Conv1d(
            mixed, mixed, config.d_conv, groups=mixed, padding=config.d_conv // 2, bias=config.conv_bias
        )
        if config.learnable_start:
            self.init_states = nn.Parameter(torch.zeros(heads, config.head_width, config.d_state))
        self.dt_bias = nn.Parameter(inverse_softplus_steps(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(inner, heads, bias=False)  # D is its bias
        self.norm = GatedRMSNorm(inner, norm_before_gate=config.norm_before_gate)
        self.out_proj = nn.Linear(inner, config.d_model, bias=config.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        if tokens.ndim != 3 or tokens.shape[2] != config.d_model:
            raise ShapeError(f"Hydra block wants (B, L, {config.d_model}), got {tuple(tokens.shape)}")
        inner, states = config.d_inner, config.groups * config.d_state
        z, mixed, raw = self.in_proj(tokens).split([inner, inner + 4 * states, 2 * config.heads], dim=-1)
        mixed = F.silu(self.conv1d(mixed.transpose(1, 2))).transpose(1, 2)
        flat, *parts = mixed.split([inner, states, states, states, states], dim=-1)
        B, C, B_back, C_back = (part.unflatten(-1, (config.groups, config.d_state)) for part in parts)
        ahead, back = (config.steps(part + self.dt_bias) for part in raw.chunk(2, dim=-1))
        y = quasiseparable(
            flat.unflatten(-1, (config.heads, config.head_width)),
            (ahead, back),
            -torch.exp(self.A_log),
            (B, B_back),
            (C, C_back),
            self.fc_D(flat) + self.D,
            self.init_states.expand(len(tokens), -1, -1, -1) if config.learnable_start else None,
            chunk=config.chunk,
        )
        out: Tensor = self.out_proj(self.norm(y.flatten(2), z))
        return out
