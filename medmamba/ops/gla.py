"""Gated linear attention: matrix state per head, one decay per key channel; one direction or both.

Letters: B batch, H heads, L length, K key width, V value width, T chunk.
Definition followed: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (Liao et al.), after
"Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al.), equation 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.errors import ShapeError

CHUNK = 16  # the decays inside a chunk take T x T x K numbers


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
    chunk = min(chunk, length)
    missing = -length % chunk
    q, k, v, log_gate = (
        (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, chunk)) for x in (q, k, v, log_gate)
    )
    sums = log_gate.cumsum(-2)
    tail = (log_gate.flip(-2).cumsum(-2).flip(-2) - log_gate).exp()
    ones = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device)
    stretch = log_gate.unsqueeze(-2).expand(*log_gate.shape[:-1], chunk, -1)  # (..., i, j, K)
    stretch = (
        stretch.masked_fill(~ones.tril(-1)[..., None], 0).cumsum(-3).masked_fill(~ones.tril()[..., None], -torch.inf)
    )
    scores = torch.einsum("...ik,...ijk,...jk->...ij", q, stretch.exp(), k)
    ends, total = (k * tail).mT @ v, sums[..., -1, :].exp()[..., None]
    out = scores @ v + (q * sums.exp()) @ _entering(ends, total)
    return out.flatten(2, 3)[:, :, :length]


def gla_bounded(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, chunk: int = 32) -> Tensor:
    """`gla_sequential` by matmuls alone, for log gates of which `chunk` in a row sum to no less than -60.

    The decay between two positions is a product of two exponentials, below exp(60) each: no digit is lost, and nothing
    of size T x T x K is made. The caller bounds the gates; beyond the bound float32 overflows.
    """
    _check(q, k, v, log_gate)
    length = q.shape[2]
    chunk = min(chunk, length)
    missing = -length % chunk
    q, k, v, log_gate = (
        (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, chunk)) for x in (q, k, v, log_gate)
    )
    sums = log_gate.cumsum(-2)
    total = sums[..., -1:, :]
    fading = q * sums.exp()
    scores = (fading @ (k * (-sums).exp()).mT).tril()
    ends = (k * (total - sums).exp()).mT @ v
    out = scores @ v + fading @ _entering(ends, total.mT.exp())
    return out.flatten(2, 3)[:, :, :length]


def _entering(ends: Tensor, total: Tensor) -> Tensor:
    """State entering every chunk (dimension 2) from what each adds and how much it keeps."""
    state, entering = torch.zeros_like(ends[:, :, 0]), []
    for end, decay in zip(ends.unbind(2), total.unbind(2)):
        entering.append(state)
        state = torch.addcmul(end, decay, state)
    return torch.stack(entering, dim=2)


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
