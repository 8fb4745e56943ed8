"""Diagonal state spaces with fixed parameters (S4D, DSS): convolution kernel and causal convolution by FFT.

Letters: H channels, N states kept (half of the complex pairs' count), L length, B batch.
Definition followed: "On the Parameterization and Initialization of Diagonal State Space Models" (Gu, Gupta, Goel, Re),
sections 3-4, zero-order hold with B = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _discrete(C: Tensor, A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """z = dt A and C (exp(z) - 1) / A, both complex (H, N)."""
    z = dt.unsqueeze(-1) * A
    return z, C * torch.expm1(z) / A


def s4d_sequential(u: Tensor, C: Tensor, A: Tensor, dt: Tensor) -> Tensor:
    """x[t] = exp(dt A) x[t-1] + u[t], y[t] = 2 Re sum_n C (exp(dt A) - 1)/A x[t]. The definition.

    u (B, H, L) real; C, A (H, N) complex; dt (H,) positive. Gives y (B, H, L). `fft_convolve(u, s4d_kernel(...))` is
    the fast form.
    """
    z, out = _discrete(C, A, dt)
    state = torch.zeros(u.shape[0], *z.shape, dtype=z.dtype, device=u.device)
    outputs = []
    for t in range(u.shape[2]):
        state = torch.exp(z) * state + u[:, :, t, None]
        outputs.append(2 * (out * state).sum(-1).real)
    return torch.stack(outputs, dim=-1)


def s4d_kernel(C: Tensor, A: Tensor, dt: Tensor, length: int) -> Tensor:
    """K[h, l] = 2 Re sum_n C (exp(z) - 1)/A exp(z l), z = dt A; complex C, A (H, N), dt (H,). Gives (H, length) real.

    exp(z l) is a product of two short tables, l = i T + j, so the (H, N, L) array never exists and the sum over n is
    a matmul. The tables' phases are taken in double precision: in single, z l at l = 1000 has lost four digits.
    """
    z, out = _discrete(C, A, dt)
    steps = max(1, round(length**0.5))
    wide = z.to(torch.complex128)
    ticks = torch.arange(max(steps, -(-length // steps)), device=z.device)
    coarse = torch.exp(wide.unsqueeze(-1) * (ticks[: -(-length // steps)] * steps)).to(z.dtype)
    fine = torch.exp(wide.unsqueeze(-1) * ticks[:steps]).to(z.dtype)
    table = (out.unsqueeze(-1) * coarse).mT @ fine  # (H, L/T, T)
    return 2 * table.real.flatten(1)[:, :length]


def convolve_sequential(u: Tensor, kernel: Tensor) -> Tensor:
    """y[t] = sum_{s <= t} kernel[t - s] u[s] per channel; u (B, H, L), kernel (H, L). The definition."""
    return torch.stack([(u[..., : t + 1] * kernel[:, : t + 1].flip(-1)).sum(-1) for t in range(u.shape[-1])], dim=-1)


def fft_convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """The fast form of `convolve_sequential`: real FFTs of length 2L."""
    length = u.shape[-1]
    product = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(product, n=2 * length)[..., :length]
