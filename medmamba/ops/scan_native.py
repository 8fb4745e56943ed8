"""The scan by the C++ kernel: tensors to pointers and strides, tasks to threads.

Tasks (batch entry, group, stretch of channels) are shared over a small pool of Python threads; ctypes lets the
interpreter go, so there is no second OpenMP beside torch's. Letters as in scan_inputs.
"""

from __future__ import annotations

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from medmamba.errors import ShapeError
from medmamba.ops.scan_build import library
from medmamba.ops.scan_inputs import ScanGradients, ScanInputs, ScanOutputs, empty_outputs

KINDS = (torch.float32, torch.bfloat16, torch.float16)  # of u, delta, B and C; everything else is float32
SMALL = 1 << 18  # state updates below which a second thread costs more than it brings
_INTEGERS = re.findall(
    r"\w+",
    "batch directions groups width states rank length softplus reverse_mask kind add "
    "ub ul uc yb yl yc gb gl gc db dk dl dc fb fk fl fc Bb Bk Bg Bl Bn Cb Ck Cg Cl Cn",
)
_POINTERS = re.findall(
    r"\w+", "order u delta B C weight A D bias initial y last borders dy dlast du ddelta dB dC dinitial"
)
_TAIL = ("eb", "ek", "eg", "el", "en", "part")
_SUMS = ("dA", "dD", "dbias", "dweight")


class _Shape(ctypes.Structure):
    """ScanShape of scan_kernel.cpp, field by field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _INTEGERS]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _TAIL]
        + [(name, ctypes.c_void_p) for name in _SUMS]
    )


class _Pool:
    """Threads made when first needed, and anew in a forked child."""

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.executor, self.size = None, 0

    def get(self, size: int) -> ThreadPoolExecutor:
        if self.executor is None or self.size < size:
            self.executor, self.size = ThreadPoolExecutor(size, thread_name_prefix="scan"), size
        return self.executor


_POOL = _Pool()


def forward(inputs: ScanInputs, *, save: bool, isa: str, into: Tensor | None = None) -> ScanOutputs:
    """y, last state and border states (float32, CPU). With `into` (B, L, D) float32, y is added to what it holds."""
    inputs = _dense(inputs)
    out = empty_outputs(inputs if into is None else inputs._replace(u=inputs.u[:, :0]), save)
    y = out.y if into is None else into
    shape = _describe(inputs, y)
    shape.y, shape.last, shape.add = y.data_ptr(), out.last.data_ptr(), int(into is not None)
    shape.borders = out.borders.data_ptr() if save else None
    _run(isa, "scan_forward", shape, _splits(isa, inputs))
    return out._replace(y=y)


def backward(
    inputs: ScanInputs, borders: Tensor, grad_y: Tensor, grad_last: Tensor | None, *, isa: str
) -> ScanGradients:
    """Gradients of `forward`, all float32, from its border states and the cotangents of y and of the last state."""
    inputs = _dense(inputs)
    splits = _splits(isa, inputs)
    batch, directions, channels, states = inputs.state_shape()
    rank = 0 if inputs.weight is None else inputs.weight.shape[2]
    sums = [torch.empty(batch, directions, channels, count, dtype=torch.float64) for count in (states, 1, 1, rank or 1)]
    du, ddelta, dB = (torch.empty_like(x, dtype=torch.float32) for x in (inputs.u, inputs.delta, inputs.B))
    parts = [(x if splits == 1 else x.new_empty(splits, *x.shape)) for x in (dB, torch.empty_like(dB))]
    dinitial = du.new_empty(inputs.state_shape())
    rank_parts = du.new_empty(splits * inputs.B.shape[2], *ddelta.shape) if rank else ddelta
    grad_last = None if grad_last is None else grad_last.contiguous()
    shape = _describe(inputs, du)
    shape.borders, shape.dy, shape.dlast = borders.data_ptr(), grad_y.data_ptr(), _address(grad_last)
    shape.du, shape.ddelta, shape.dinitial = du.data_ptr(), rank_parts.data_ptr(), dinitial.data_ptr()
    shape.dB, shape.dC = (x.data_ptr() for x in parts)
    (shape.eb, shape.ek, shape.eg, shape.el, shape.en) = parts[0].stride()[-5:]
    shape.part = parts[0].stride(0) if splits > 1 else 0
    (shape.fb, shape.fk, shape.fl, shape.fc) = ddelta.stride()
    (shape.gb, shape.gl, shape.gc) = grad_y.stride()
    shape.dA, shape.dD, shape.dbias, shape.dweight = (x.data_ptr() for x in sums)
    _run(isa, "scan_backward", shape, splits)
    dA, dD, dbias, dweight = (x.sum(0).to(torch.float32) for x in sums)
    dB, dC = (x if splits == 1 else x.sum(0) for x in parts)
    return ScanGradients(
        du,
        rank_parts.sum(0) if rank else ddelta,
        dweight if rank else du.new_empty(0),
        dA,
        dB,
        dC,
        du.new_empty(0) if inputs.D is None else dD[..., 0],
        du.new_empty(0) if inputs.bias is None else dbias[..., 0],
        du.new_empty(0) if inputs.initial is None else dinitial,
    )


def _dense(inputs: ScanInputs) -> ScanInputs:
    """The small per-channel tensors contiguous; the big ones keep their strides."""
    small = {name: getattr(inputs, name) for name in ("weight", "A", "D", "bias", "initial", "order")}
    dense: dict[str, Any] = {name: None if x is None else x.contiguous() for name, x in small.items()}
    return inputs._replace(**dense)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _describe(inputs: ScanInputs, like_u: Tensor) -> _Shape:
    batch, directions, channels, states = inputs.state_shape()
    groups = inputs.B.shape[2]
    rank = 0 if inputs.weight is None else inputs.weight.shape[2]
    numbers = (batch, directions, groups, channels // groups, states, rank, inputs.u.shape[1], int(inputs.softplus),
               inputs.reverse_mask, KINDS.index(inputs.u.dtype), 0,
               *inputs.u.stride(), *like_u.stride(), 0, 0, 0, *inputs.delta.stride(), 0, 0, 0, 0,
               *inputs.B.stride(), *inputs.C.stride())  # fmt: skip
    shape = _Shape(*numbers)
    order = inputs.order
    if order is not None and (int(order.min()) < 0 or int(order.max()) >= inputs.u.shape[1]):
        raise ShapeError(f"direction table names positions outside 0..{inputs.u.shape[1] - 1}")
    for name in ("order", "u", "delta", "weight", "A", "B", "C", "D", "bias", "initial"):
        setattr(shape, name, _address(getattr(inputs, name)))
    return shape


def _splits(isa: str, inputs: ScanInputs) -> int:
    """Stretches of channels per batch entry and group: enough for all threads, one when the work is small."""
    threads, groups = torch.get_num_threads(), inputs.B.shape[2]
    if threads == 1 or inputs.u.numel() * inputs.A.shape[0] * inputs.A.shape[2] < SMALL:
        return 1
    blocks = -(-(inputs.u.shape[2] // groups) // library(isa).scan_lanes())
    return min(blocks, -(-threads // (inputs.u.shape[0] * groups)))


def _run(isa: str, name: str, shape: _Shape, splits: int) -> None:
    function = getattr(library(isa), name)
    tasks = shape.batch * shape.groups * splits
    work = shape.batch * shape.groups * shape.width * shape.length * shape.states * shape.directions
    workers = min(torch.get_num_threads(), tasks) if work >= SMALL else 1
    cuts = [ctypes.c_int64(tasks * i // workers) for i in range(workers + 1)]

    def part(i: int) -> int:
        return function(ctypes.byref(shape), ctypes.c_int64(splits), cuts[i], cuts[i + 1])

    others = [_POOL.get(workers - 1).submit(part, i) for i in range(1, workers)] if workers > 1 else []
    failed = part(0) + sum(other.result() for other in others)
    if failed:
        raise MemoryError(f"{name}: no memory for the work space of one chunk")
