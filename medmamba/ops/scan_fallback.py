"""One scan call by the pure-torch chunked form: any device, float32 or float64, no compiler.

Every direction is a copy, a scan and a merge; this is also the definition of what several directions mean.
Letters as in scan_inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.ops.scan_inputs import ScanGradients, ScanInputs, ScanOutputs, empty_gradients, empty_outputs
from medmamba.ops.scan_torch import chunked_backward, chunked_forward


def forward(inputs: ScanInputs, *, save: bool) -> ScanOutputs:
    """y, last state and border states."""
    out = empty_outputs(inputs, save)
    for k in range(inputs.A.shape[0]):
        u, raw, A, B, C = _direction(inputs, k)
        y, last, starts = chunked_forward(u, _step(raw, inputs), A, B, C, _state(inputs, k), save=save)
        y = y if inputs.D is None else y.addcmul_(_grouped(inputs.D[k], inputs), u)
        visited = _unvisit(y.flatten(2), inputs, k)
        _ = out.y.copy_(visited) if k == 0 else out.y.add_(visited)
        out.last[:, k] = last.mT.flatten(1, 2)
        if save:  # (chunks, B, G, N, D) -> (B, chunks, G, ND)
            states = starts.movedim(1, 0).flatten(3)
            out.borders[:, k, ..., : states.shape[-1]] = states
    return out


def backward(inputs: ScanInputs, borders: Tensor, grad_y: Tensor, grad_last: Tensor | None) -> ScanGradients:
    """Gradients of `forward` from its border states and the cotangents of y and of the last state."""
    out = empty_gradients(inputs)
    for k in range(inputs.A.shape[0]):
        u, raw, A, B, C = _direction(inputs, k)
        g_y = _visit(grad_y, inputs, k).unflatten(2, u.shape[2:])
        dlast = torch.zeros_like(_state(inputs, k)) if grad_last is None else _blocked(grad_last[:, k], inputs)
        count = A.shape[1] * A.shape[2]
        starts = borders[:, k, ..., :count].unflatten(-1, A.shape[1:]).movedim(1, 0)
        g = chunked_backward(u, _step(raw, inputs), A, B, C, starts, g_y, dlast)
        du = g.u if inputs.D is None else g.u.addcmul_(_grouped(inputs.D[k], inputs), g_y)
        _ = (
            out.u.copy_(_unvisit(du.flatten(2), inputs, k))
            if k == 0
            else out.u.add_(_unvisit(du.flatten(2), inputs, k))
        )
        draw = (g.dt * torch.sigmoid(raw) if inputs.softplus else g.dt).flatten(2)
        if inputs.weight is None:
            out.delta[:, k] = _unvisit(draw, inputs, k)
        else:
            out.delta[:, k] = _unvisit(draw @ inputs.weight[k], inputs, k)
            out.weight[k] = torch.einsum("bld,blr->dr", draw, _visit(inputs.delta[:, k], inputs, k))
        out.A[k] = g.A.mT.flatten(0, 1)
        for into, value in ((out.B, g.B), (out.C, g.C)):
            into[:, k] = _unvisit(value.flatten(2), inputs, k).unflatten(2, value.shape[2:]).movedim(2, 1)
        if inputs.D is not None:
            out.D[k] = (g_y * u).sum((0, 1)).flatten()
        if inputs.bias is not None:
            out.bias[k] = draw.sum((0, 1))
        if inputs.initial is not None:
            out.initial[:, k] = g.initial_state.mT.flatten(1, 2)
    return out


def _visit(x: Tensor, inputs: ScanInputs, k: int) -> Tensor:
    """(B, L, ...) in the order of direction k."""
    if inputs.order is not None:
        return x.index_select(1, inputs.order[k].long())
    return x.flip(1) if inputs.reverse_mask >> k & 1 else x


def _unvisit(x: Tensor, inputs: ScanInputs, k: int) -> Tensor:
    """Inverse of `_visit`."""
    if inputs.order is not None:
        return torch.empty_like(x).index_copy_(1, inputs.order[k].long(), x)
    return x.flip(1) if inputs.reverse_mask >> k & 1 else x


def _grouped(x: Tensor, inputs: ScanInputs) -> Tensor:
    """Last dimension (channels) as (G, channels of a group)."""
    return x.unflatten(-1, (inputs.B.shape[2], -1))


def _blocked(state: Tensor, inputs: ScanInputs) -> Tensor:
    """(B, D, N) as (B, G, N, D of a group)."""
    return state.unflatten(1, (inputs.B.shape[2], -1)).mT.contiguous()


def _state(inputs: ScanInputs, k: int) -> Tensor:
    batch, _, channels, states = inputs.state_shape()
    start = inputs.u.new_zeros(batch, channels, states) if inputs.initial is None else inputs.initial[:, k]
    return _blocked(start, inputs)


def _direction(inputs: ScanInputs, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta before softplus, A, B, C of direction k in visiting order, channels grouped."""
    delta = _visit(inputs.delta[:, k], inputs, k)
    delta = delta if inputs.weight is None else delta @ inputs.weight[k].mT
    delta = delta if inputs.bias is None else delta + inputs.bias[k]
    A = _grouped(inputs.A[k].mT, inputs).movedim(0, 1).contiguous()  # (G, N, D)
    B, C = (_visit(x[:, k].movedim(1, 2), inputs, k) for x in (inputs.B, inputs.C))
    return _grouped(_visit(inputs.u, inputs, k), inputs), _grouped(delta, inputs), A, B, C


def _step(raw: Tensor, inputs: ScanInputs) -> Tensor:
    return F.softplus(raw) if inputs.softplus else raw
