"""A grid of powers of two on which sums of float32 numbers are exact, so that a coupling can be undone bit for bit.

Multiples of s added and subtracted stay exact in float32 while they are below 2**24 s (24 bits of mantissa).
Rounding passes the gradient through unchanged, and makes it dense: a strided view of a gradient and a dense one are
summed in another order, and a recomputed pass would differ from a stored one in the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError

MANTISSA_BITS = 24  # of float32


def dense(stream: Tensor) -> Tensor:
    """The stream (B, *space, C) with the strides of a fresh tensor, those of axes of length 1 included."""
    return stream.contiguous().view(-1).view(stream.shape)


class _Round(torch.autograd.Function):
    """Nearest multiple of `step`, at least float32; `step` None: unchanged."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, step: Tensor | None) -> Tensor:
        ctx.dtype = stream.dtype
        stream = stream if stream.dtype == torch.float64 else stream.float()
        if step is None:
            return stream.view_as(stream)
        return (stream / step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dense(grad).to(ctx.dtype), None


class Snap:
    """The grid as it stands during one forward pass: `snap(x)` rounds, `watched` notes the largest value."""

    def __init__(self, step: Tensor | None, peak: Tensor | None) -> None:
        self.step, self.peak = step, peak

    def __call__(self, stream: Tensor) -> Tensor:
        out: Tensor = _Round.apply(stream, self.step)
        return out

    @torch.no_grad()
    def watched(self, state: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`state`, the largest absolute value of what is new in it noted."""
        if self.peak is not None:
            for stream in state:
                if all(stream is not old for old in before):
                    low, high = stream.aminmax()  # twenty times as fast as vector_norm on a CPU
                    torch.maximum(self.peak, torch.maximum(-low, high).to(self.peak), out=self.peak)
        return state


class Grid(nn.Module):
    """Makes the `Snap` of each forward pass. `bits` 14: multiples of 2**-14, exact below 1024; None: no rounding.

    In training, when the pass before came within a factor 2 of the range, the grid becomes coarser by one bit; no value
    is read back from the device for it. `step` is part of the weights.
    """

    step: Tensor
    peak: Tensor

    def __init__(self, bits: int | None = 14) -> None:
        super().__init__()
        if bits is not None and not 0 <= bits <= 20:
            raise ConfigError(f"grid_bits={bits}: 0 to 20, or none for no rounding")
        self.bits = bits
        self.register_buffer("step", torch.tensor(2.0 ** -(bits or 0)))
        self.register_buffer("peak", torch.tensor(0.0), persistent=False)

    @torch.no_grad()
    def forward(self) -> Snap:
        if self.bits is None:
            return Snap(None, None)
        if self.training:
            self.step.mul_(torch.where(self.peak > self._range() / 2, 2.0, 1.0))
            self.peak.zero_()
        return Snap(self.step.clone(), self.peak if self.training else None)

    def _range(self) -> Tensor:
        return self.step * 2**MANTISSA_BITS

    @property
    def exact(self) -> bool:
        """Whether the last training pass stayed in the range, so that its gradients are those of a stored one."""
        return self.bits is not None and bool(self.peak <= self._range())
