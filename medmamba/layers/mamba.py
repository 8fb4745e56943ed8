"""The Mamba block (selective state space with gate), in one direction or in several over the same tokens.

Letters in this file: B batch, L tokens, M model width, D inner width (expand * M), R step rank, N states.
Definition followed: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4; the
backward direction of Vision Mamba (Zhu et al. 2024) and the slice direction of SegMamba (Xing et al. 2024) are further
entries of `directions`. Parameter names are those of the published weights. Truth for tests: golden cases mamba_block,
vim, segmamba.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.scan import selective_scan

Order = Callable[[int], Tensor]
"""Gives for L tokens the order (L,) in which a direction reads them."""

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # step sizes at the start of training, as published


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig:
    """Sizes of a Mamba block. `dt_rank` None means ceil(d_model / 16)."""

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | None = None
    conv_bias: bool = True
    bias: bool = False
    average: bool = False
    layer_scale: float | None = None

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


def backward(length: int) -> Tensor:
    """Last token first."""
    return torch.arange(length - 1, -1, -1)


def sliced(slices: int) -> Order:
    """Position p of each of `slices` consecutive chunks comes together: new index = p * slices + chunk.

    The order raises ShapeError when the number of tokens is not a multiple of `slices`.
    """

    def order(length: int) -> Tensor:
        if length % slices:
            raise ShapeError(f"{length} tokens cannot be cut in {slices} equal slices; choose a fitting input size")
        return torch.arange(length).view(slices, length // slices).T.flatten()

    return order


def inverse_softplus_steps(count: int) -> Tensor:
    """Biases (count,) whose softplus is log-uniform between DT_MIN and DT_MAX."""
    log_steps = math.log(DT_MIN) + torch.rand(count) * (math.log(DT_MAX) - math.log(DT_MIN))
    steps = log_steps.exp().clamp(min=DT_FLOOR)
    return steps + torch.log(-torch.expm1(-steps))


class Mamba(nn.Module):
    """Tokens (B, L, M) -> (B, L, M).

    `directions` maps the suffix of a parameter set ("" forward, "_b", "_s") to the order in which it reads the tokens
    (None: as they come). in_proj and out_proj are shared, the gated results are summed in token order, averaged with
    `config.average`, and the output is multiplied by `gamma` with `config.layer_scale`.
    """

    def __init__(self, config: MambaConfig, directions: Mapping[str, Order | None] | None = None) -> None:
        super().__init__()
        self.config = config
        self.directions = {"": None} if directions is None else dict(directions)
        inner, rank, states = config.d_inner, config.rank, config.d_state
        if min(inner, rank, states, config.d_conv) < 1:
            raise ConfigError(f"Mamba block needs positive sizes, got {config}")
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=config.bias)
        for number, suffix in enumerate(self.directions):
            conv = nn.Conv1d(
                inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1, bias=config.conv_bias
            )
            step = nn.Linear(rank, inner)
            if number == 0:  # published code protects only the first direction's step size
                nn.init.uniform_(step.weight, -(rank**-0.5), rank**-0.5)
                step.bias.data.copy_(inverse_softplus_steps(inner))
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * states, bias=False))
            self.add_module(f"dt_proj{suffix}", step)
            log_rates = torch.arange(1, states + 1, dtype=torch.float32).log().repeat(inner, 1)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(log_rates))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, config.d_model, bias=config.bias)
        if config.layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((config.d_model,), config.layer_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[2] != self.config.d_model:
            raise ShapeError(f"Mamba block wants (B, L, {self.config.d_model}), got {tuple(tokens.shape)}")
        xz = self.in_proj(tokens).transpose(1, 2)  # (B, 2D, L)
        total = torch.stack([self._direction(xz, *item) for item in self.directions.items()]).sum(0)
        if self.config.average:
            total = total / len(self.directions)
        out: Tensor = self.out_proj(total.transpose(1, 2))
        return out if self.config.layer_scale is None else out * self.gamma

    def _direction(self, xz: Tensor, suffix: str, order: Order | None) -> Tensor:
        """Gated scan of one direction, (B, 2D, L) -> (B, D, L), read in `order` and put back in token order."""
        if order is None:
            return self._scan(xz, suffix)
        index = order(xz.shape[2]).to(xz.device)
        return self._scan(xz[:, :, index], suffix)[:, :, index.argsort()]

    def _scan(self, xz: Tensor, suffix: str) -> Tensor:
        conv, project, step = (self.get_submodule(name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        x, z = xz.chunk(2, dim=1)
        x = F.silu(conv(x)[:, :, : x.shape[2]])
        sizes = [self.config.rank, self.config.d_state, self.config.d_state]
        low, B, C = project(x.transpose(1, 2)).transpose(1, 2).split(sizes, dim=1)
        assert isinstance(step, nn.Linear)
        A = -torch.exp(self.get_parameter(f"A{suffix}_log"))
        D = self.get_parameter(f"D{suffix}")
        y = selective_scan(x, step.weight @ low, A, B, C, D, z, step.bias, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y
