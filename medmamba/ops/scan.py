"""Selective scan (S6), the state-space core: the sequential definition and the door to the fast forms.

Letters: B batch, D channels, L length, N states, G groups of channels that share one B and C.
Definition followed: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu, Dao), section 3 with the
discretisation of its reference code: x[t] = exp(dt A) x[t-1] + dt B[t] u[t], y[t] = C[t] x[t].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.errors import ShapeError
from medmamba.ops.scan_inputs import check_shapes
from medmamba.ops.scan_op import scan_call


def scan_sequential(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, one position after another, in the dtype of `u` (float64 makes it the truth of the tests).

    u, delta, z (B, D, L); A (D, N) real; B, C each (B, N, L) or (B, G, N, L), channel c reads group c // (D / G);
    D, delta_bias (D,); initial_state (B, D, N). Gives y (B, D, L) and, if asked, the last state (B, D, N).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    B_full, C_full = (_grouped(x).repeat_interleave(u.shape[1] // _grouped(x).shape[1], dim=1) for x in (B, C))
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        state = torch.exp(step * A) * state + step * u[:, :, t, None] * B_full[..., t]
        outputs.append((state * C_full[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The fast form of `scan_sequential`: same arguments, same result, gradients of every tensor.

    float32, bfloat16 and float16 run with a float32 state and give y in the dtype of `u`; float64 stays float64.
    The last state is float32 (float64). Raises ShapeError when shapes do not fit.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    B, C = _of_equal_groups(_grouped(B), _grouped(C))
    y, last = scan_call(
        backend,
        u=u.mT,
        delta=delta.mT.unsqueeze(1),
        A=A.unsqueeze(0),
        B=B.mT.unsqueeze(1),
        C=C.mT.unsqueeze(1),
        D=None if D is None else D.unsqueeze(0),
        bias=None if delta_bias is None else delta_bias.unsqueeze(0),
        initial=None if initial_state is None else initial_state.unsqueeze(1),
        softplus=delta_softplus,
    )
    y = y.mT if z is None else y.mT * F.silu(z.to(y.dtype))
    return (y.to(u.dtype), last.squeeze(1)) if return_last_state else y.to(u.dtype)


def _grouped(x: Tensor) -> Tensor:
    """B or C as (B, G, N, L)."""
    return x.unsqueeze(1) if x.dim() == 3 else x


def _of_equal_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, G, N, L) of one G: the backends know one number of groups, B and C may come in two."""
    if B.shape[1] == C.shape[1]:
        return B, C
    groups = math.lcm(B.shape[1], C.shape[1])
    return B.repeat_interleave(groups // B.shape[1], dim=1), C.repeat_interleave(groups // C.shape[1], dim=1)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raise ShapeError, naming the argument, unless all shapes fit u (B, D, L) and A (D, N)."""
    if u.dim() != 3 or A.dim() != 2 or u.shape[2] < 1:
        raise ShapeError(f"u {tuple(u.shape)} must be (B, D, L) with L >= 1 and A {tuple(A.shape)} (D, N)")
    batch, channels, length = u.shape
    states = A.shape[1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, tuple(u.shape)),
        "A": (A, (channels, states)),
        "z": (z, tuple(u.shape)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    for name, x in (("B", B), ("C", C)):
        groups = x.shape[1] if x.dim() == 4 else 1
        if channels % groups:
            raise ShapeError(f"{name} has {groups} groups, which do not divide {channels} channels")
        wanted[name] = (x, (batch, states, length) if x.dim() == 3 else (batch, groups, states, length))
    check_shapes(wanted)
