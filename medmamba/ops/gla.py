"""Gated linear attention: matrix state per head, one decay per key channel; one direction or both.

Letters: B batch, H heads, L length, K key width, V value width, T chunk.
Definition followed: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (Liao et al.), after
"Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al.), equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.errors import ShapeError

CHUNK = 16  # the decays inside a chunk take T x T x K numbers
BOUNDED_CHUNK = 32


def gla_sequential(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """S[t] = diag(exp(log_gate[t])) S[t-1] + k[t] v[t]^T, o[t] = q[t] S[t]. The definition; `gla` is the fast form.

    q, k, log_gate (B, H, L, K), v (B, H, L, V); no scale is applied to q. Gives o (B, H, L, V).
    """
    _check(q, k, v, log_gate)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        state = torch.exp(log_gate[:, :, t])[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=2)


def gla(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The fast form of `gla_sequential`: chunks of `chunk` positions by matmuls, states carried across chunks.

    Every exponent is a sum of log gates over a stretch inside a chunk, never a difference: strong gates stay exact.
    """
    _check(q, k, v, log_gate)
    length = q.shape[2]
    q, k, v, log_gate = (_in_chunks(x, min(chunk, length)) for x in (q, k, v, log_gate))
    sums = log_gate.cumsum(-2)
    tail = (log_gate.flip(-2).cumsum(-2).flip(-2) - log_gate).exp()
    scores = torch.einsum("...ik,...ijk,...jk->...ij", q, _decays(log_gate), k)
    ends = (k * tail).mT @ v
    start = torch.zeros_like(ends[:, :, 0])
    out = scores @ v + (q * sums.exp()) @ _entering(_leaving(ends, sums[..., -1, :], start), start)
    return out.flatten(2, 3)[:, :, :length]


def gla_bounded(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None, *, chunk: int = BOUNDED_CHUNK
) -> tuple[Tensor, Tensor]:
    """`gla_sequential` by matmuls alone, for log gates of which `chunk` in a row sum to no less than -60.

    Begins in `state` (B, H, K, V), zeros if None; gives o and the last state. The decay between two positions is a
    product of two exponentials, below exp(60) each: no digit is lost, and nothing of size T x T x K is made. The caller
    bounds the gates; beyond the bound float32 overflows.
    """
    _check(q, k, v, log_gate)
    length = q.shape[2]
    q, k, v, log_gate = (_in_chunks(x, min(chunk, length)) for x in (q, k, v, log_gate))
    sums = log_gate.cumsum(-2)
    total = sums[..., -1:, :]
    fading = q * sums.exp()
    scores = (fading @ (k * (-sums).exp()).mT).tril()
    ends = (k * (total - sums).exp()).mT @ v
    if state is None:
        state = torch.zeros_like(ends[:, :, 0])
    leaving = _leaving(ends, total.squeeze(-2), state)
    out = scores @ v + fading @ _entering(leaving, state)
    return out.flatten(2, 3)[:, :, :length], leaving[:, :, -1]


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, L, ...) -> (B, H, chunks, chunk, ...), zeros behind the end: they add nothing and keep all."""
    missing = -x.shape[2] % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
    return x.unflatten(2, (-1, chunk))


def _decays(log_gate: Tensor) -> Tensor:
    """(..., T, K) -> (..., i, j, K): what is left at i of what came in at j, 0 for j behind i."""
    size = log_gate.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_gate.device)
    stretch = log_gate.unsqueeze(-2).expand(*log_gate.shape[:-1], size, -1)
    stretch = stretch.masked_fill(~ones.tril(-1)[..., None], 0).cumsum(-3)
    return stretch.masked_fill(~ones.tril()[..., None], -torch.inf).exp()


def _leaving(ends: Tensor, total: Tensor, start: Tensor) -> Tensor:
    """State (B, H, n, K, V) after each of n chunks, from what each adds (B, H, n, K, V), its log decay (B, H, n, K) and
    the state at the start: groups of chunks by one matmul, then groups of groups."""
    count = ends.shape[2]
    size = min(CHUNK, count)
    ends, total = (_in_chunks(x, size) for x in (ends, total))
    inside = torch.einsum("...ijk,...jkv->...ikv", _decays(total), ends)
    sums = total.cumsum(-2)
    if count == size:
        before = start.unsqueeze(2)
    else:
        before = _entering(_leaving(inside[:, :, :, -1], sums[..., -1, :], start), start)
    return torch.addcmul(inside, sums.exp().unsqueeze(-1), before.unsqueeze(3)).flatten(2, 3)[:, :, :count]


def _entering(leaving: Tensor, start: Tensor) -> Tensor:
    """State before each chunk from the states after them."""
    return torch.cat([start.unsqueeze(2), leaving[:, :, :-1]], dim=2)


def gla_bidirectional_sequential(
    q: Tensor, k: Tensor, v: Tensor, forward_gate: Tensor, backward_gate: Tensor
) -> Tensor:
    """Mean of the scan and of the reversed scan, each with its own log gates (given in the order of q)."""
    ahead = gla_sequential(q, k, v, forward_gate)
    back = gla_sequential(q.flip(2), k.flip(2), v.flip(2), backward_gate.flip(2)).flip(2)
    return (ahead + back) / 2


def gla_bidirectional(
    q: Tensor, k: Tensor, v: Tensor, forward_gate: Tensor, backward_gate: Tensor, *, chunk: int = CHUNK
) -> Tensor:
    """The fast form of `gla_bidirectional_sequential`: both directions as one batch."""
    both = [torch.cat([x, y.flip(2)]) for x, y in ((q, q), (k, k), (v, v), (forward_gate, backward_gate))]
    ahead, back = gla(*both, chunk=chunk).chunk(2)
    return (ahead + back.flip(2)) / 2


def _check(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> None:
    if q.shape != k.shape or q.shape != log_gate.shape or q.shape[:3] != v.shape[:3] or q.dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, log_gate))
        raise ShapeError(
            f"q, k, v, log_gate have shapes {shapes}; expected (B, H, L, K) three times and v (B, H, L, V)"
        )
