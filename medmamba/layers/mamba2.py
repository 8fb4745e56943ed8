"""The Mamba-2 block: one decay per head, gated root-mean-square norm before the output projection.

Letters in this file: B batch, L tokens, M model width, D inner width, H heads of width P, G groups of N states.
Definition followed: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality" (2024), section 7. Parameter names are those of the published weights. Truth: golden mamba2_ssd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.norms import GatedRMSNorm
from medmamba.ops.ssd import ssd


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Config:
    """Sizes of a block with scalar decay per head (Mamba-2, Hydra). `step_limit` clamps the step after softplus."""

    d_model: int
    d_state: int = 64
    d_conv: int = 4
    expand: float = 2
    head_width: int = 128
    groups: int = 1
    chunk: int = 32
    learnable_start: bool = False
    step_limit: tuple[float, float] | None = None
    norm_before_gate: bool = False
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.d_inner % self.head_width or self.heads % self.groups:
            raise ConfigError(
                f"inner width {self.d_inner} must be heads of {self.head_width}, a multiple of {self.groups} groups"
            )

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def heads(self) -> int:
        return self.d_inner // self.head_width

    def steps(self, raw: Tensor) -> Tensor:
        """softplus(raw) within the limit."""
        steps = F.softplus(raw)
        return steps if self.step_limit is None else steps.clamp(*self.step_limit)


class Mamba2(nn.Module):
    """Tokens (B, L, M) -> (B, L, M), causal."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        inner, heads = config.d_inner, config.heads
        mixed = inner + 2 * config.groups * config.d_state
        self.in_proj = nn.Linear(config.d_model, inner + mixed + heads, bias=config.bias)
        self.conv1d = nn.Conv1d(
            mixed, mixed, config.d_conv, groups=mixed, padding=config.d_conv - 1, bias=config.conv_bias
        )
        if config.learnable_start:
            self.init_states = nn.Parameter(torch.zeros(heads, config.head_width, config.d_state))
        self.dt_bias = nn.Parameter(inverse_softplus_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, norm_before_gate=config.norm_before_gate)
        self.out_proj = nn.Linear(inner, config.d_model, bias=config.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        if tokens.ndim != 3 or tokens.shape[2] != config.d_model:
            raise ShapeError(f"Mamba-2 block wants (B, L, {config.d_model}), got {tuple(tokens.shape)}")
        inner, states = config.d_inner, config.groups * config.d_state
        z, mixed, raw_steps = self.in_proj(tokens).split([inner, inner + 2 * states, config.heads], dim=-1)
        mixed = F.silu(self.conv1d(mixed.transpose(1, 2))[:, :, : tokens.shape[1]]).transpose(1, 2)
        flat, B, C = mixed.split([inner, states, states], dim=-1)
        x = flat.unflatten(-1, (config.heads, config.head_width))
        B, C = (part.unflatten(-1, (config.groups, config.d_state)) for part in (B, C))
        start = self.init_states.expand(len(tokens), -1, -1, -1) if config.learnable_start else None
        dt = config.steps(raw_steps + self.dt_bias)
        y, _ = ssd(x, dt, -torch.exp(self.A_log), B, C, start, chunk=config.chunk)
        y = (y + self.D[:, None] * x).flatten(2)
        out: Tensor = self.out_proj(self.norm(y, z))
        return out
