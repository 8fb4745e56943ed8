"""The scan as torch.library custom ops, forward and backward, with fake kernels and autograd registered.

torch.compile, torch.export and torch.func see `medmamba::selective_scan` as one opaque op; which backend runs is
settled inside it. `medmamba::selective_scan_into` adds into a tensor that is there and has no gradient. Letters as in
scan_inputs; the arguments of every op begin with the fields of ScanInputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medmamba.ops import scan_fallback, scan_native, scan_triton
from medmamba.ops.backend import resolve
from medmamba.ops.scan_inputs import ScanGradients, ScanInputs, ScanOutputs, empty_gradients, empty_outputs

FIELDS = len(ScanInputs._fields)
INPUTS = (
    "Tensor u, Tensor delta, Tensor? weight, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? initial, "
    "Tensor? order, int reverse_mask, bool softplus"
)


@torch.library.custom_op(
    "medmamba::selective_scan",
    mutates_args=(),
    schema=f"({INPUTS}, bool save, str backend) -> (Tensor, Tensor, Tensor)",
)
def scan_op(*args: Any) -> tuple[Tensor, ...]:
    """ScanOutputs of ScanInputs; `save` keeps the border states that backward wants."""
    *inputs, save, backend = args
    return tuple(_forward(ScanInputs(*inputs), save, backend))


@scan_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(empty_outputs(ScanInputs(*args[:FIELDS]), args[FIELDS]))


@torch.library.custom_op(
    "medmamba::selective_scan_into",
    mutates_args=("into",),
    schema=f"({INPUTS}, Tensor(a!) into, str backend) -> Tensor",
)
def scan_into_op(*args: Any) -> Tensor:
    """Adds y of ScanInputs to what `into` (B, L, D) holds and gives the last state."""
    inputs, into, backend = ScanInputs(*args[:FIELDS]), args[FIELDS], args[-1]
    name, isa = resolve(backend, inputs.u)
    if name == "native":
        return scan_native.forward(inputs, save=False, isa=isa, into=into).last
    if name == "triton":
        return scan_triton.forward(inputs, save=False, into=into).last
    y, last, _ = _forward(inputs, False, backend)
    into.add_(y)
    return last


@scan_into_op.register_fake
def _(*args: Any) -> Tensor:
    return empty_outputs(ScanInputs(*args[:FIELDS]), False).last


@torch.library.custom_op(
    "medmamba::selective_scan_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor borders, Tensor grad_y, Tensor? grad_last, str backend) -> "
    f"({', '.join(['Tensor'] * len(ScanGradients._fields))})",
)
def scan_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """ScanGradients of `scan_op`, each in the dtype of its input."""
    inputs = ScanInputs(*args[:FIELDS])
    borders, grad_y, grad_last, backend = args[FIELDS:]
    if not borders.numel():
        borders = _forward(inputs, True, backend).borders
    name, isa = resolve(backend, inputs.u)
    if name == "native":
        found = scan_native.backward(inputs, borders, grad_y, grad_last, isa=isa)
    elif name == "triton":
        found = scan_triton.backward(inputs, borders, grad_y, grad_last)
    else:
        found = scan_fallback.backward(inputs.widened(), borders, grad_y, grad_last)
    return tuple(g.to(x.dtype) if isinstance(x, Tensor) else g for x, g in zip(inputs, found))


@scan_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(ScanInputs(*args[:FIELDS])))


def _forward(inputs: ScanInputs, save: bool, backend: str) -> ScanOutputs:
    name, isa = resolve(backend, inputs.u)
    if name == "native":
        return scan_native.forward(inputs, save=save, isa=isa)
    if name == "triton":
        return scan_triton.forward(inputs, save=save)
    return scan_fallback.forward(inputs.widened(), save=save)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, reverse_mask, softplus, _, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.settings = (reverse_mask, softplus, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, borders = ctx.saved_tensors
    reverse_mask, softplus, backend = ctx.settings
    if grad_y is None:
        if grad_last is None:
            return (None,) * (FIELDS + 2)
        grad_y = torch.zeros_like(tensors[0], dtype=grad_last.dtype)
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
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return scan_op(*inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _FunctionalBackward(torch.autograd.Function):
    """The backward op inside torch.func transforms; it has no derivative of its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return scan_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        raise NotImplementedError(
            "selective_scan has no second derivative; differentiate scan_sequential twice instead"
        )


def scan_call(
    backend: str,
    *,
    softplus: bool,
    order: Tensor | None = None,
    reverse_mask: int = 0,
    into: Tensor | None = None,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and last state of the op on `tensors` named as in ScanInputs, with a float32 state (float64 of
    float64). y is added to `into` (B, L, D) in place if given: by the backend itself where no gradient is wanted.
    """
    inputs = _cast(tensors)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    settings = (order, reverse_mask, softplus)
    if into is not None and into.dtype == inputs[3].dtype and not save and not _transformed():
        return into, scan_into_op(*inputs, *settings, into, backend)
    run = _FunctionalScan.apply if _transformed() else scan_op
    y, last, _ = run(*inputs, *settings, save, backend)
    return (y if into is None else into.add_(y)), last


def _cast(tensors: dict[str, Tensor | None]) -> list[Any]:
    """The tensors of ScanInputs in order: u, delta, B, C stay 16-bit where all four are of one such dtype."""
    big = [tensors[name] for name in ("u", "delta", "B", "C")]
    dtypes = {x.dtype for x in big if x is not None}
    kind = torch.float64 if big[0] is not None and big[0].dtype == torch.float64 else torch.float32
    narrow = len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}
    cast = []
    for name in ScanInputs._fields[: FIELDS - 3]:
        x = tensors.get(name)
        cast.append(x if x is None or (narrow and name in ("u", "delta", "B", "C")) else x.to(kind))
    return cast
