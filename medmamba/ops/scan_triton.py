"""The scan by Triton kernels, for CUDA tensors: shapes to launches, parts to gradients.

One launch takes every channel block through all directions in turn, so each adds into y without atomics and in the
same order every time. Where there are too few channel blocks to fill a GPU, positions are cut into stretches: a first
pass finds what each stretch sends on, `carry_kernel` what enters it, and then the directions run one launch after
another, because two directions of different stretches would meet in y. Letters as in scan_inputs.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba.ops.scan_inputs import CHUNK, PAD, ScanGradients, ScanInputs, ScanOutputs, empty_outputs

FILL = 2048  # programs of one warp that keep a large GPU busy: about 16 for each of 132 multiprocessors
LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


@functools.cache
def unavailable(device: str) -> str:
    """Why triton does not serve tensors on `device`; empty when it does.

    With TRITON_INTERPRET=1 in the environment from the start it runs the kernels in Python, on CPU tensors.
    """
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves CUDA tensors"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install 'medmamba[triton]'"
    return ""


class _Plan(NamedTuple):
    """How one call is cut up, and the whole numbers that every kernel takes."""

    sizes: dict[str, int]
    block: int  # channels of a program
    blocks: int  # programs side by side in a group
    segments: int  # stretches of positions


def forward(inputs: ScanInputs, *, save: bool, into: Tensor | None = None) -> ScanOutputs:
    """y (added to `into` where that is given), last state and border states, float32."""
    from medmamba.ops.scan_triton_kernels import forward_kernel

    inputs, out = _dense(inputs), empty_outputs(inputs, save)
    plan = _plan(inputs)
    carry = _entering(inputs, inputs.initial, plan, 0)
    out = out if into is None else out._replace(y=into)
    given = _given(inputs, plan) | _strides("y", "blc", out.y) | {"fresh": int(into is None)}
    results: dict[str, Tensor | None] = {"y": out.y, "borders": out.borders if save else None}
    _sweep(forward_kernel, given, results, inputs, plan, carry, reverse=0)
    out.last.copy_(_states(carry[:, :, -1], inputs))
    return out


def backward(inputs: ScanInputs, borders: Tensor, grad_y: Tensor, grad_last: Tensor | None) -> ScanGradients:
    """Gradients of `forward`, float32, from its border states and the cotangents of y and of the last state."""
    from medmamba.ops.scan_triton_kernels import backward_kernel

    inputs = _dense(inputs)
    plan = _plan(inputs)
    batch, count, channels, states = inputs.state_shape()
    groups, length = inputs.B.shape[2:4]
    carry = _entering(inputs, grad_last, plan, -1)
    du, ddelta, dB, dC = (torch.empty_like(x, dtype=carry.dtype) for x in (inputs.u, inputs.delta, inputs.B, inputs.B))
    draw = ddelta if inputs.weight is None else carry.new_empty(batch, count, length, channels)
    parts = [carry.new_empty(plan.blocks, batch, count, groups, length, states) for _ in "BC"]
    dA = torch.zeros_like(carry, dtype=torch.float64)
    dD, dbias = (torch.empty_like(dA[..., 0, :], memory_format=torch.contiguous_format) for _ in "Db")
    given = _given(inputs, plan) | {"borders": borders, "dy": grad_y, "batch": batch}
    for letter, dims, x in (("g", "blc", grad_y), ("e", "blc", du), ("f", "bklc", draw)):
        given |= _strides(letter, dims, x)
    results: dict[str, Tensor | None] = {"du": du, "ddelta": draw, "dA": dA, "dB": parts[0], "dC": parts[1]}
    _sweep(backward_kernel, given, results | {"dD": dD, "dbias": dbias}, inputs, plan, carry, reverse=1)
    for into, part in zip((dB, dC), parts):
        into.copy_(part.sum(0))
    dweight = None
    if inputs.weight is not None:
        ddelta.copy_(draw @ inputs.weight)
        dweight = torch.einsum("bkld,bklr->kdr", draw, inputs.delta.to(draw.dtype))
    found = (
        du,
        ddelta,
        dweight,
        _states(dA.sum((0, 2)), inputs).float(),
        dB,
        dC,
        None if inputs.D is None else _channels(dD, inputs),
        None if inputs.bias is None else _channels(dbias, inputs),
        None if inputs.initial is None else _states(carry[:, :, 0], inputs).clone(),
    )
    return ScanGradients(*(inputs.u.new_empty(0) if x is None else x for x in found))


def _sweep(
    kernel: Any,
    given: dict[str, Any],
    results: dict[str, Tensor | None],
    inputs: ScanInputs,
    plan: _Plan,
    carry: Tensor,
    *,
    reverse: int,
) -> None:
    """All directions through `kernel`; `carry` holds what enters the scan, and afterwards what leaves each stretch."""
    from medmamba.ops.scan_triton_kernels import carry_kernel

    batch, count, _, states = inputs.state_shape()
    columns = batch * inputs.B.shape[2] * plan.blocks

    def launch(first: int, last: int, **buffers: Tensor | None) -> None:
        kernel[(columns * plan.segments,)](**given, **buffers, first=first, last=last, **LAUNCH)

    with torch.cuda.device_of(inputs.u):
        if plan.segments == 1:
            return launch(0, count, **results, carry=carry, sums=None)
        ends, sums = torch.zeros_like(carry), torch.empty_like(carry[..., 0, :], memory_format=torch.contiguous_format)
        launch(0, count, **dict.fromkeys(results), carry=ends, sums=sums)
        wanted = ("directions", "groups", "width", "padded", "states", "segments")
        carry_kernel[(columns * count * states,)](
            inputs.A, ends, sums, carry, *map(plan.sizes.__getitem__, wanted), reverse, CHUNK, plan.block, **LAUNCH
        )
        for k in range(count):
            launch(k, k + 1, **results, carry=carry, sums=None)


def _dense(inputs: ScanInputs) -> ScanInputs:
    """The small per-channel tensors contiguous, as the kernels read them; the big ones keep their strides."""
    small = {name: getattr(inputs, name) for name in ("weight", "A", "D", "bias", "order")}
    dense: dict[str, Any] = {name: None if x is None else x.contiguous() for name, x in small.items()}
    return inputs._replace(**dense)


def _plan(inputs: ScanInputs) -> _Plan:
    batch, count, channels, states = inputs.state_shape()
    groups, length = inputs.B.shape[2:4]
    width = channels // groups
    block = min(PAD, 1 << (width - 1).bit_length())
    blocks, chunks = -(-width // block), -(-length // CHUNK)
    per = -(-chunks // max(1, min(chunks, FILL // (batch * groups * blocks))))
    segments = -(-chunks // per)
    sizes = {"directions": count, "groups": groups, "width": width, "padded": -(-width // PAD) * PAD, "states": states,
             "rank": 0 if inputs.weight is None else inputs.weight.shape[2], "length": length, "segments": segments,
             "per": per}  # fmt: skip
    return _Plan(sizes, block, blocks, segments)


def _strides(letter: str, dims: str, x: Tensor) -> dict[str, int]:
    return {letter + dim: step for dim, step in zip(dims, x.stride())}


def _given(inputs: ScanInputs, plan: _Plan) -> dict[str, Any]:
    """What forward and backward take alike, by the names of the kernels."""
    names = ("u", "delta", "weight", "A", "B", "C", "D", "bias", "order", "reverse_mask")
    given = {name: getattr(inputs, name) for name in names} | plan.sizes
    for letter, dims, x in (("u", "blc", inputs.u), ("d", "bklc", inputs.delta), ("B", "bkgln", inputs.B),
                            ("C", "bkgln", inputs.C)):  # fmt: skip
        given |= _strides(letter, dims, x)
    return given | {"SOFTPLUS": inputs.softplus, "T": CHUNK, "J": plan.block}


def _entering(inputs: ScanInputs, state: Tensor | None, plan: _Plan, opening: int) -> Tensor:
    """Room for what enters every stretch, (B, K, segments, G, N, padded), with `state` (B, K, D, N) at `opening`."""
    batch, count, _, states = inputs.state_shape()
    groups, width = plan.sizes["groups"], plan.sizes["width"]
    carry = torch.zeros(batch, count, plan.segments, groups, states, plan.sizes["padded"], device=inputs.u.device)
    if state is not None:
        carry[:, :, opening, ..., :width] = state.unflatten(2, (groups, width)).mT
    return carry


def _states(carry: Tensor, inputs: ScanInputs) -> Tensor:
    """(..., G, N, padded) as (..., D, N)."""
    width = inputs.u.shape[2] // inputs.B.shape[2]
    return carry[..., :width].mT.flatten(-3, -2)


def _channels(sums: Tensor, inputs: ScanInputs) -> Tensor:
    """Sums of (B, K, segments, G, padded) over batch and stretches, as (K, D) float32."""
    width = inputs.u.shape[2] // inputs.B.shape[2]
    return sums.sum((0, 2))[..., :width].flatten(1).float()
