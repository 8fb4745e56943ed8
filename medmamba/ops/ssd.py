"""State-space duality: Mamba-2's scalar-decay scan, its non-causal form (VSSD) and the two-sided one (Hydra).

Letters: B batch, L length, H heads, P width of a head, G groups of heads sharing one B and C, N states, T chunk,
Z chunks.
Definitions followed: "Transformers are SSMs" (Dao, Gu) section 6; "VSSD: Vision Mamba with Non-Casual State Space
Duality" section 3; "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.errors import ShapeError

CHUNK = 32  # PERFORMANCE: 16-32 is best on a CPU, the mask costs T exponentials per token and head


def segment_sums(x: Tensor) -> Tensor:
    """S[i, j] = sum of x over (j, i] for i >= j, -inf above the diagonal; x (..., T) -> (..., T, T).

    Masked cumulative sums, not differences of cumulative sums, which lose digits.
    """
    steps = x.shape[-1]
    ones = torch.ones(steps, steps, dtype=torch.bool, device=x.device)
    sums = x.unsqueeze(-1).expand(*x.shape, steps).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), float("-inf"))


def ssd_sequential(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S[t] = exp(dt A) S[t-1] + dt x[t] outer B[t], y[t] = S[t] C[t]. The definition; `ssd` is the fast form.

    x (B, L, H, P); dt (B, L, H) already positive; A (H,); B, C (B, L, G, N), head h reads group h // (H / G);
    initial_state (B, H, P, N). Gives y (B, L, H, P) and the final state.
    """
    _check(x, dt, A, B, C)
    repeat = x.shape[2] // B.shape[2]
    B_h, C_h = B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B_h[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + drive
        outputs.append((state * C_h[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The fast form of `ssd_sequential`: matmuls inside chunks of `chunk` positions, one small loop across them."""
    _check(x, dt, A, B, C)
    length, groups = x.shape[1], B.shape[2]
    chunk = min(chunk, length)
    missing = -length % chunk
    x, dt, B, C = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing)) if missing else v for v in (x, dt, B, C))
    drive = (x * dt[..., None]).unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).permute(0, 1, 3, 4, 2, 5)
    B_z, C_z = (v.unflatten(1, (-1, chunk)).transpose(2, 3).unsqueeze(3) for v in (B, C))  # (B, Z, G, 1, T, N)
    decay = (dt * A).unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).permute(0, 1, 3, 4, 2)  # (B, Z, G, R, T)
    sums = decay.cumsum(-1)
    scores = (C_z @ B_z.mT) * segment_sums(decay).exp()
    tail = (decay.flip(-1).cumsum(-1).flip(-1) - decay).exp()  # decay from after t to the end of the chunk
    ends = (drive * tail[..., None]).mT @ B_z  # (B, Z, G, R, P, N)
    start = ends.new_zeros(ends[:, 0].shape) if initial_state is None else initial_state.unflatten(1, (groups, -1))
    entering, final = _carry(ends, sums[..., -1].exp()[..., None, None], start)
    y = scores @ drive + (C_z * sums.exp()[..., None]) @ entering.mT
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]
    return y, final.flatten(1, 2)


def _carry(ends: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """State entering every chunk (dimension 1) and the state after the last one."""
    entering = []
    for end, decay in zip(ends.unbind(1), total.unbind(1)):
        entering.append(state)
        state = torch.addcmul(end, decay, state)
    return torch.stack(entering, dim=1), state


def ssd_noncausal_sequential(x: Tensor, weight: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One state for all positions, S[h] = sum_l weight[l] x[l] outer B[l]; every position reads it: y[l] = S C[l].

    x (B, L, H, P); weight (B, L, H); B, C (B, L, G, N), head h reads group h MOD G (not as in Mamba-2). y as x.
    """
    heads, groups = x.shape[2], B.shape[2]
    group = torch.arange(heads, device=x.device) % groups
    state = sum(
        (weight[:, t, :, None] * x[:, t])[..., None] * B[:, t, group][:, :, None] for t in range(x.shape[1])
    )  # (B, H, P, N)
    return torch.stack([(state * C[:, t, group][:, :, None]).sum(-1) for t in range(x.shape[1])], dim=1)


def ssd_noncausal(x: Tensor, weight: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The fast form of `ssd_noncausal_sequential`: two matmuls."""
    groups = B.shape[2]
    drive = (x * weight[..., None]).unflatten(2, (-1, groups))  # (B, L, R, G, P)
    state = torch.einsum("blgn,blrgp->brgnp", B, drive)
    return torch.einsum("blgn,brgnp->blrgp", C, state).flatten(2, 3)


def quasiseparable_sequential(
    x: Tensor,
    dt: tuple[Tensor, Tensor],
    A: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    diagonal: Tensor,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Hydra's mixer: strictly-before from a forward scan, strictly-after from a backward scan, own diagonal.

    x (B, L, H, P); dt, B, C pairs (forward, backward) in the order of x, shaped as in `ssd`; diagonal (B, L, H)
    multiplies the position itself; initial_state (B, H, P, N) serves both directions. Gives y as x.
    """
    y = diagonal[..., None] * x
    for side, turn in ((0, False), (1, True)):
        parts = [v.flip(1) if turn else v for v in (x, dt[side], B[side], C[side])]
        scanned, _ = ssd_sequential(parts[0], parts[1], A, parts[2], parts[3], initial_state)
        shifted = torch.cat([torch.zeros_like(scanned[:, :1]), scanned[:, :-1]], dim=1)
        y = y + (shifted.flip(1) if turn else shifted)
    return y


def quasiseparable(
    x: Tensor,
    dt: tuple[Tensor, Tensor],
    A: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    diagonal: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The fast form of `quasiseparable_sequential`: both directions as one batch of `ssd`."""
    both = [torch.cat([ahead, back.flip(1)]) for ahead, back in ((x, x), dt, B, C)]
    state = None if initial_state is None else torch.cat([initial_state, initial_state])
    scanned, _ = ssd(both[0], both[1], A, both[2], both[3], state, chunk=chunk)
    shifted = F.pad(scanned, (0, 0, 0, 0, 1, 0))[:, :-1]
    ahead, back = shifted.chunk(2)
    return ahead + back.flip(1) + diagonal[..., None] * x


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    batch, length, heads, _ = x.shape
    groups, states = B.shape[2:]
    wanted = {"dt": (dt, (batch, length, heads)), "A": (A, (heads,)), "B": (B, (batch, length, groups, states)),
              "C": (C, (batch, length, groups, states))}  # fmt: skip
    for name, (value, shape) in wanted.items():
        if tuple(value.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(value.shape)}, expected {shape} for x {tuple(x.shape)}")
    if heads % groups:
        raise ShapeError(f"{groups} groups do not divide {heads} heads")
