"""The scan as two torch.library custom ops, forward and backward, with fake kernels and autograd registered.

torch.compile, torch.export and torch.func see `medmamba::selective_scan` as one opaque op; which backend runs is
settled inside it. Letters as in scan_inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medmamba.ops import scan_fallback, scan_native
from medmamba.ops.backend import resolve
from medmamba.ops.scan_inputs import ScanInputs, empty_gradients, empty_outputs

Outputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("medmamba::selective_scan", mutates_args=())
def scan_op(
    u: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    reverse_mask: int,
    softplus: bool,
    save: bool,
    backend: str,
) -> Outputs:
    """ScanOutputs of ScanInputs; `save` keeps the border states that backward wants."""
    inputs = ScanInputs(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus)
    y, last, borders = _forward(inputs, save, backend)
    return y, last, borders


@scan_op.register_fake
def _(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus, save, backend):  # type: ignore[no-untyped-def]
    inputs = ScanInputs(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus)
    return tuple(empty_outputs(inputs, save))


@torch.library.custom_op("medmamba::selective_scan_backward", mutates_args=())
def scan_backward_op(
    u: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    reverse_mask: int,
    softplus: bool,
    borders: Tensor,
    grad_y: Tensor,
    grad_last: Tensor | None,
    backend: str,
) -> Gradients:
    """ScanGradients of `scan_op`."""
    inputs = ScanInputs(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus)
    if not borders.numel():
        borders = _forward(inputs, True, backend)[2]
    name, isa = resolve(backend, u)
    if name == "native":
        g = scan_native.backward(inputs, borders, grad_y, grad_last, isa=isa)
    else:
        g = scan_fallback.backward(inputs, borders, grad_y, grad_last)
    return g.u, g.delta, g.weight, g.A, g.B, g.C, g.D, g.bias, g.initial


@scan_backward_op.register_fake
def _(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus, borders, grad_y, grad_last, backend):  # type: ignore[no-untyped-def]
    return tuple(
        empty_gradients(ScanInputs(u, delta, weight, A, B, C, D, bias, initial, order, reverse_mask, softplus))
    )


def _forward(inputs: ScanInputs, save: bool, backend: str) -> Outputs:
    name, isa = resolve(backend, inputs.u)
    if name == "native":
        return scan_native.forward(inputs, save=save, isa=isa)
    return scan_fallback.forward(inputs, save=save)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, reverse_mask, softplus, _, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.settings = (reverse_mask, softplus, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, borders = ctx.saved_tensors
    reverse_mask, softplus, backend = ctx.settings
    if grad_y is None:
        if grad_last is None:
            return (None,) * 14
        grad_y = torch.zeros_like(tensors[0])
    run = _FunctionalBackward.apply if _transformed() else scan_backward_op
    grads = run(*tensors, reverse_mask, softplus, borders, grad_y, grad_last, backend)
    present = [None if x is None else g for x, g in zip(tensors, grads)]
    return (*present, None, None, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup_context)


def _transformed() -> bool:
    """Whether a torch.func transform is active: it refuses the autograd nodes that torch.library makes."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _FunctionalScan(torch.autograd.Function):
    """The op inside torch.func transforms."""

    @staticmethod
    def forward(*inputs: Any) -> Outputs:
        return scan_op(*inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _FunctionalBackward(torch.autograd.Function):
    """The backward op inside torch.func transforms; it has no derivative of its own."""

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        return scan_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        raise NotImplementedError(
            "selective_scan has no second derivative; differentiate scan_sequential twice instead"
        )


def scan_call(
    kind: torch.dtype,
    backend: str,
    *,
    softplus: bool,
    order: Tensor | None = None,
    reverse_mask: int = 0,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and last state of the op on `tensors` named as in ScanInputs, computed in `kind`."""
    names = ("u", "delta", "weight", "A", "B", "C", "D", "bias", "initial")
    cast = [None if x is None else x.to(kind) for x in map(tensors.get, names)]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in cast)
    run = _FunctionalScan.apply if _transformed() else scan_op
    y, last, _ = run(*cast, order, reverse_mask, softplus, save, backend)
    return y, last
