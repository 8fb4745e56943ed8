"""One map scanned in several directions, in place: no permuted copy, no flip, no merge.

Letters: B batch, S positions of the map (one axis each), D channels, K directions, N states, G groups, R rank of delta.
Definition followed: "VMamba: Visual State Space Model", section 4.2 (cross scan, S6, cross merge);
`scan_directions_sequential` spells it out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.scan import scan_sequential
from medmamba.ops.scan_inputs import check_shapes
from medmamba.ops.scan_op import scan_call

Direction = tuple[int, int]  # (axis that runs fastest, +1 or -1: the whole sequence reversed)


def all_directions(rank: int) -> tuple[Direction, ...]:
    """Every axis forward, then every axis reversed, last axis first: 4 of a 2D map (VMamba's order), 6 of a volume."""
    return tuple((axis, sign) for sign in (1, -1) for axis in reversed(range(rank)))


@functools.lru_cache(maxsize=64)
def direction_order(space: tuple[int, ...], direction: Direction) -> Tensor:
    """Positions (L,) of a C-ordered map in the order direction (axis, sign) visits them; int32."""
    axis, sign = direction
    if not -len(space) <= axis < len(space) or sign not in (1, -1):
        raise ConfigError(f"direction {direction} of a map {space}: axis must be below {len(space)}, sign +1 or -1")
    order = torch.arange(math.prod(space), dtype=torch.int32).reshape(space).movedim(axis, -1).flatten()
    return order.flip(0) if sign < 0 else order


@functools.lru_cache(maxsize=64)
def _plan(space: tuple[int, ...], directions: tuple[Direction, ...], device: torch.device) -> tuple[Tensor | None, int]:
    """Table of positions (K, L), or None and the bits of reversed directions when all run along the last axis."""
    if all(axis in (-1, len(space) - 1) for axis, _ in directions):
        return None, sum(1 << k for k, (_, sign) in enumerate(directions) if sign < 0)
    return torch.stack([direction_order(space, d) for d in directions]).to(device), 0


def selective_scan_directions(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    directions: Sequence[Direction] | Tensor,
    delta_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    into: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum over K directions of the selective scan of one channels-last map; every tensor stays in map order.

    u (B, *S, D); delta (B, K, *S, D), or (B, K, *S, R) with delta_weight (K, D, R): delta = delta_weight r; A
    (K, D, N); B, C (B, K, *S, N) or grouped (B, K, G, *S, N); D, delta_bias (K, D); initial_state (B, K, D, N).
    `directions` are (fastest axis, sign) pairs, or a table (K, L) of positions in visiting order (any route). All
    strides are taken as they are. Gives y as u, and if asked the last states (B, K, D, N). `into`, a float32 (float64)
    tensor shaped as u, is added to in place and is y. 16-bit u, delta, B and C of one dtype are read as they are, with
    a float32 state. Raises ShapeError, ConfigError.
    """
    space, count = tuple(u.shape[1:-1]), A.shape[0]
    order, reverse_mask = _order(directions, space, u.device)
    _check(u, delta, A, B, C, D, delta_bias, delta_weight, initial_state, into, len(directions))
    first = B.dim() - 1 - len(space)  # 3 when groups are given
    flat = [x if first == 3 else x.unsqueeze(2) for x in (B, C)]
    y, last = scan_call(
        backend,
        softplus=delta_softplus,
        order=order,
        reverse_mask=reverse_mask,
        u=u.flatten(1, -2),
        delta=delta.flatten(2, -2),
        weight=delta_weight,
        A=A,
        B=flat[0].flatten(3, -2),
        C=flat[1].flatten(3, -2),
        D=D,
        bias=delta_bias,
        initial=initial_state,
        into=None if into is None else into.view(u.shape[0], -1, u.shape[-1]),
    )
    y = y.unflatten(1, space).to(u.dtype) if into is None else into
    return (y, last.reshape(u.shape[0], count, *A.shape[1:])) if return_last_state else y


def scan_directions_sequential(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    directions: Sequence[Direction] | Tensor,
    delta_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: copy the map in the order of each direction, scan, put back, add. Gives y and the last states."""
    space = tuple(u.shape[1:-1])
    y, states = torch.zeros_like(u).flatten(1, -2), []
    for k in range(A.shape[0]):
        order = directions[k] if isinstance(directions, Tensor) else direction_order(space, directions[k])
        order = order.long()
        step = delta[:, k] if delta_weight is None else delta[:, k] @ delta_weight[k].mT
        B_k, C_k = (x[:, k] if x.dim() == delta.dim() + 1 else x[:, k].unsqueeze(1) for x in (B, C))
        scanned, state = scan_sequential(
            u.flatten(1, -2)[:, order].mT,
            step.flatten(1, -2)[:, order].mT,
            A[k],
            B_k.flatten(2, -2)[:, :, order].mT,
            C_k.flatten(2, -2)[:, :, order].mT,
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
            None if initial_state is None else initial_state[:, k],
            return_last_state=True,
        )
        y = y + torch.zeros_like(y).index_copy(1, order, scanned.mT)
        states.append(state)
    return y.unflatten(1, space), torch.stack(states, dim=1)


def _order(
    directions: Sequence[Direction] | Tensor, space: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, int]:
    if not isinstance(directions, Tensor):
        return _plan(space, tuple((axis, sign) for axis, sign in directions), device)
    if directions.shape[1:] != (math.prod(space),):
        raise ShapeError(f"direction table has shape {tuple(directions.shape)}, expected (K, {math.prod(space)})")
    return directions.to(device=device, dtype=torch.int32), 0


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    initial_state: Tensor | None,
    into: Tensor | None,
    count: int,
) -> None:
    """Raise ShapeError, naming the argument, unless all shapes fit u (B, *S, D) and A (K, D, N)."""
    if u.dim() < 3 or A.dim() != 3 or A.shape[0] != count or min(u.shape) < 1:
        raise ShapeError(f"u {tuple(u.shape)} must be (B, *S, D), A {tuple(A.shape)} (K, D, N) with K = {count}")
    batch, *space, channels = u.shape
    states = A.shape[2]
    groups = [B.shape[2]] if B.dim() == len(space) + 4 else []
    if groups and channels % groups[0]:
        raise ShapeError(f"B has {groups[0]} groups, which do not divide {channels} channels")
    width = channels if delta_weight is None else delta_weight.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (batch, count, *space, width)),
        "A": (A, (count, channels, states)),
        "B": (B, (batch, count, *groups, *space, states)),
        "C": (C, (batch, count, *groups, *space, states)),
        "D": (D, (count, channels)),
        "delta_bias": (delta_bias, (count, channels)),
        "delta_weight": (delta_weight, (count, channels, width)),
        "initial_state": (initial_state, (batch, count, channels, states)),
        "into": (into, tuple(u.shape)),
    }
    check_shapes(wanted)
