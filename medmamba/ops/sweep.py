"""A recurrence over a long sequence, piece by piece: between forward and backward only the states at borders stay.

Letters: B batch, L positions, D channels. A cell makes (y, next state) of (x, state, *weights), x and y both (B, l, D).
The idea of chunked recomputation: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
section 3.3. Truth for tests: `sweep_sequential`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Cell = Callable[..., tuple[Tensor, Tensor]]

SHORTEST, MOST = 1024, 4  # positions of a piece, at the least; pieces of a sequence, at the most


def sweep_sequential(cell: Cell, x: Tensor, state: Tensor, *weights: Tensor, length: int) -> Tensor:
    """The cell over pieces of x of `length` positions, each beginning in the state the last one left: y (B, L, D).

    The definition; `sweep` is the sparing form.
    """
    outputs = []
    for piece in x.split(length, dim=1):
        y, state = cell(piece, state, *weights)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def sweep(cell: Cell, x: Tensor, state: Tensor, *weights: Tensor, length: int | None = None) -> Tensor:
    """`sweep_sequential` in the memory of one piece: the backward pass runs the cell again, from the last piece to the
    first. The cell must give the same on every call and take all that learns as an argument; no second derivatives."""
    if torch.compiler.is_compiling():  # opaque, as its backward pass runs autograd of its own
        return torch.compiler.disable(sweep)(cell, x, state, *weights, length=length)  # type: ignore[no-any-return]
    length = length or max(SHORTEST, -(-x.shape[1] // MOST))
    out: Tensor = _Sweep.apply(cell, length, x, state, *weights)
    return out


class _Sweep(torch.autograd.Function):
    """The whole sequence as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, length: int, x: Tensor, state: Tensor, *weights: Tensor) -> Tensor:
        ctx.cell, ctx.length = cell, length
        y, states = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for piece, out in zip(x.split(length, dim=1), y.split(length, dim=1), strict=True):
            states.append(state)
            made, state = cell(piece, state, *weights)
            out.copy_(made)
        ctx.save_for_backward(x, torch.stack(states), *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a sweep has no second derivatives; differentiate sweep_sequential twice instead")
        x, states, *weights = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_state, sums = torch.zeros_like(states[0]), [torch.zeros_like(w) for w in weights]
        pieces = [t.split(ctx.length, dim=1) for t in (x, grad_y, grad_x)]
        for piece, above, below, state in reversed(list(zip(*pieces, states, strict=True))):
            leaves = [t.detach().requires_grad_() for t in (piece, state, *weights)]
            with torch.enable_grad():
                made = ctx.cell(*leaves)
            found, grad_state, *own = torch.autograd.grad(made, leaves, (above, grad_state))
            below.copy_(found)
            sums = [a + b for a, b in zip(sums, own, strict=True)]
        return (None, None, grad_x, grad_state, *sums)
