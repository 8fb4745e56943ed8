"""What one scan call is made of, in the one layout all backends share.

Letters: B batch, K directions, L positions, G groups, D channels of all groups, N states, R rank of delta.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medmamba.errors import ShapeError

CHUNK = 32  # steps between stored border states, the same for every backend
PAD = 16  # channels of a group are stored in multiples of this


class ScanInputs(NamedTuple):
    """Tensors of any strides. K directions run over the same `u`; their outputs are added.

    All are of one dtype, float32 or float64; but u, delta, B and C may together be bfloat16 or float16 beside float32.
    """

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, K, L, D), or (B, K, L, R) with `weight`
    weight: Tensor | None  # (K, D, R)
    A: Tensor  # (K, D, N)
    B: Tensor  # (B, K, G, L, N)
    C: Tensor  # (B, K, G, L, N)
    D: Tensor | None  # (K, D)
    bias: Tensor | None  # (K, D)
    initial: Tensor | None  # (B, K, D, N)
    order: Tensor | None  # (K, L) int32: position visited at every step; None: first to last, or the reverse
    reverse_mask: int  # bit k set: direction k runs from last to first (only without `order`)
    softplus: bool

    def state_shape(self) -> tuple[int, int, int, int]:
        """(B, K, D, N)."""
        return (self.u.shape[0], *self.A.shape)

    def widened(self) -> ScanInputs:
        """All tensors in the dtype of the state, for a backend that does not read 16-bit numbers."""
        big = {name: getattr(self, name).to(self.A.dtype) for name in ("u", "delta", "B", "C")}
        return self._replace(**big)

    def border_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the stored border states: one float per state and padded channel, every CHUNK steps."""
        groups = self.B.shape[2]
        padded = (self.u.shape[2] // groups + PAD - 1) // PAD * PAD
        chunks = (self.u.shape[1] + CHUNK - 1) // CHUNK
        return (self.u.shape[0], self.A.shape[0], chunks, groups, padded * self.A.shape[2])


def check_shapes(wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise ShapeError, naming the argument, unless every tensor that is given has its shape."""
    for name, (x, shape) in wanted.items():
        if x is not None and tuple(x.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}, expected {shape}")


class ScanOutputs(NamedTuple):
    """In the dtype of the state."""

    y: Tensor  # (B, L, D)
    last: Tensor  # (B, K, D, N)
    borders: Tensor  # ScanInputs.border_shape, or (0,) when nothing is to be differentiated


class ScanGradients(NamedTuple):
    """As the inputs; (0,) where an input is absent."""

    u: Tensor
    delta: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor
    initial: Tensor


def empty_outputs(inputs: ScanInputs, save: bool) -> ScanOutputs:
    """Uninitialised outputs: what every backend fills and what the fake kernel returns."""
    kind = inputs.A.dtype
    borders = inputs.border_shape() if save else (0,)
    return ScanOutputs(
        torch.empty_like(inputs.u, dtype=kind),
        inputs.u.new_empty(inputs.state_shape(), dtype=kind),
        inputs.u.new_empty(borders, dtype=kind),
    )


def empty_gradients(inputs: ScanInputs) -> ScanGradients:
    """Uninitialised gradients, laid out as the inputs where these are dense (C as B)."""

    def optional(x: Tensor | None) -> Tensor:
        return inputs.u.new_empty(0 if x is None else x.shape)

    return ScanGradients(
        torch.empty_like(inputs.u),
        torch.empty_like(inputs.delta),
        optional(inputs.weight),
        inputs.A.new_empty(inputs.A.shape),
        torch.empty_like(inputs.B),
        torch.empty_like(inputs.B),
        optional(inputs.D),
        optional(inputs.bias),
        inputs.u.new_empty(inputs.state_shape() if inputs.initial is not None else (0,)),
    )
