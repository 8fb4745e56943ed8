"""The S4D layer: a diagonal state space with fixed parameters as one long convolution, then a gated pointwise mix.

Letters in this file: B batch, H channels, N states (N / 2 complex pairs are kept), L tokens.
Definition followed: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models"
(2022). Parameter names are those of the published stand-alone layer. Truth: golden s4d.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.s4d import fft_convolve, s4d_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class S4DConfig:
    """Sizes of an S4D layer; `channels_first` reads (B, H, L), else (B, L, H). `dropout` drops whole channels."""

    d_model: int
    d_state: int = 64
    dropout: float = 0.0
    channels_first: bool = True
    step_min: float = 1e-3
    step_max: float = 1e-1


class DiagonalKernel(nn.Module):
    """The convolution kernel (H, L) of H independent diagonal state spaces."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        if config.d_state < 2 or config.d_state % 2:
            raise ConfigError(f"states come in complex pairs: d_state must be even, got {config.d_state}")
        channels, pairs = config.d_model, config.d_state // 2
        low, high = math.log(config.step_min), math.log(config.step_max)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(channels, pairs, dtype=torch.complex64)))
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(low, high))
        self.log_A_real = nn.Parameter(torch.full((channels, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs, dtype=torch.float32).repeat(channels, 1))

    def forward(self, length: int) -> Tensor:
        rates = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        return s4d_kernel(torch.view_as_complex(self.C.contiguous()), rates, torch.exp(self.log_dt), length)


class S4D(nn.Module):
    """Tokens -> tokens of the same layout: convolution + skip, GELU, pointwise linear with a gate (GLU)."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        self.config = config
        self.D = nn.Parameter(torch.randn(config.d_model))
        self.kernel = DiagonalKernel(config)
        self.dropout = nn.Dropout1d(config.dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(config.d_model, 2 * config.d_model, 1), nn.GLU(dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        u = tokens if self.config.channels_first else tokens.transpose(1, 2)
        if u.ndim != 3 or u.shape[1] != self.config.d_model:
            raise ShapeError(f"S4D layer wants {self.config.d_model} channels, got {tuple(tokens.shape)}")
        y = fft_convolve(u, self.kernel(u.shape[2])) + self.D[:, None] * u
        y = self.output_linear(self.dropout(F.gelu(y)))
        return y if self.config.channels_first else y.transpose(1, 2)
