"""The selective scan in pure torch, two levels deep: chunks side by side, steps one after another.

Letters: B batch, L length, G groups, D channels of one group, N states, T steps of a chunk, K chunks handled at once.
A block of K chunks is laid out (T, K, B, G, N, D): step t of all chunks is one contiguous slab, so a step of the
recurrence is one call. Local ends are carried from chunk to chunk with the closed-form decay exp(A sum(dt)), then the
chunks run again from their true start. Backward keeps only the state at chunk starts (N/T of a map).
Works in float32 and float64 on any device. Truth: ops.scan.scan_sequential.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medmamba.ops.scan_inputs import CHUNK

SLAB_ELEMENTS = 64 * 1024  # numbers in one step of all chunks: 256 kB, what a core's cache takes


class ChunkGradients(NamedTuple):
    """Gradients of `chunked_forward`, shaped as its arguments."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


def _plan(length: int, width: int) -> tuple[int, int]:
    """Steps per chunk and chunks per block for sequences of `length` with `width` = B*G*N*D states each."""
    steps = min(CHUNK, length)
    return steps, max(1, min(-(-length // steps), SLAB_ELEMENTS // max(width, 1)))


def _tiles(x: Tensor, start: int, steps: int, chunks: int) -> Tensor:
    """Positions [start, start + steps*chunks) of x (B, L, ...) as (T, K, B, ...), zeros past the end."""
    piece = x[:, start : start + steps * chunks]
    missing = steps * chunks - piece.shape[1]
    if missing:
        piece = torch.cat([piece, piece.new_zeros(piece.shape[0], missing, *piece.shape[2:])], dim=1)
    return piece.unflatten(1, (chunks, steps)).movedim(2, 0).movedim(2, 1).contiguous()


def _untile(tile: Tensor, into: Tensor, start: int) -> None:
    """Write (T, K, B, ...) back to positions start.. of into (B, L, ...)."""
    flat = tile.movedim(1, 2).movedim(0, 2).flatten(1, 2)
    count = min(flat.shape[1], into.shape[1] - start)
    into[:, start : start + count] = flat[:, :count]


def _drive(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decay exp(dt A) and drive dt B u of a block, (T, K, B, G, N, D) each."""
    decay = torch.mul(dt.unsqueeze(-2), A).exp_()
    return decay, torch.mul((dt * u).unsqueeze(-2), B.unsqueeze(-1))


def _run(decay: Tensor, states: Tensor, entering: Tensor) -> None:
    """Drive -> states in place, every chunk from its own `entering` state (K, B, G, N, D)."""
    before = entering
    for t in range(decay.shape[0]):
        before = states[t].addcmul_(decay[t], before)


def _run_back(decay: Tensor, adjoint: Tensor, entering: Tensor) -> None:
    """g[t] += decay[t+1] g[t+1] in place; `entering` is what the next chunk sends to the last step."""
    adjoint[-1] += entering
    for t in range(decay.shape[0] - 2, -1, -1):
        adjoint[t].addcmul_(decay[t + 1], adjoint[t + 1])


def _starts(decay: Tensor, drive: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """State entering every chunk of a block, and the state leaving the block."""
    ends = drive[0]
    for t in range(1, drive.shape[0]):
        ends = torch.addcmul(drive[t], decay[t], ends)
    entering = torch.empty_like(ends)
    for k in range(ends.shape[0]):
        entering[k] = state
        state = torch.addcmul(ends[k], total[k], state)
    return entering, state


def _arrivals(decay: Tensor, seed: Tensor, total: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint arriving at the last step of every chunk from the right, and what leaves the block to the left."""
    ends = seed[-1]
    for t in range(seed.shape[0] - 2, -1, -1):
        ends = torch.addcmul(seed[t], decay[t + 1], ends)
    ends = ends * decay[0]
    entering = torch.empty_like(ends)
    for k in range(ends.shape[0] - 1, -1, -1):
        entering[k] = arriving
        arriving = torch.addcmul(ends[k], total[k], arriving)
    return entering, arriving


def chunked_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, *, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, last state and the chunk-start states (empty unless `save`).

    u, dt (B, L, G, D) with dt already positive; A (G, N, D); B, C (B, L, G, N); initial_state (B, G, N, D).
    Gives y (B, L, G, D), last (B, G, N, D), starts (chunks, B, G, N, D).
    """
    length = u.shape[1]
    steps, chunks = _plan(length, initial_state.numel())
    y, state, kept = torch.empty_like(u), initial_state, []
    for start in range(0, length, steps * chunks):
        count = min(chunks, -(-(length - start) // steps))
        u_t, dt_t, B_t, C_t = (_tiles(x, start, steps, count) for x in (u, dt, B, C))
        decay, states = _drive(u_t, dt_t, A, B_t)
        entering, state = _starts(decay, states, (dt_t.sum(0).unsqueeze(-2) * A).exp_(), state)
        _run(decay, states, entering)
        _untile(torch.matmul(C_t.unsqueeze(-2), states).squeeze(-2), y, start)
        if save:
            kept.append(entering)
    return y, state.clone(), torch.cat(kept) if kept else u.new_empty(0)


def chunked_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, grad_y: Tensor, grad_last: Tensor
) -> ChunkGradients:
    """Gradients of `chunked_forward` from the cotangents of y (B, L, G, D) and of the last state (B, G, N, D)."""
    length = u.shape[1]
    steps, chunks = _plan(length, grad_last.numel())
    sum_A = A.new_zeros(A.shape, dtype=torch.float64)
    out = ChunkGradients(
        torch.empty_like(u), torch.empty_like(dt), sum_A, torch.empty_like(B), torch.empty_like(C), grad_last
    )
    arriving = grad_last
    for start in reversed(range(0, length, steps * chunks)):
        count = min(chunks, -(-(length - start) // steps))
        tiles = tuple(_tiles(x, start, steps, count) for x in (u, dt, B, C, grad_y))
        first = start // steps
        arriving = _block_backward(tiles, A, starts[first : first + count], arriving, out, start)
    return out._replace(A=out.A.to(A.dtype), initial_state=arriving.clone())


def _block_backward(
    tiles: tuple[Tensor, ...], A: Tensor, entering: Tensor, arriving: Tensor, out: ChunkGradients, start: int
) -> Tensor:
    """One block of `chunked_backward`: fills its positions of `out`, adds to out.A, returns what goes left."""
    u, dt, B, C, grad_y = tiles
    decay, states = _drive(u, dt, A, B)
    _run(decay, states, entering)
    adjoint = torch.mul(grad_y.unsqueeze(-2), C.unsqueeze(-1))
    arrivals, leaving = _arrivals(decay, adjoint, (dt.sum(0).unsqueeze(-2) * A).exp_(), arriving)
    _run_back(decay, adjoint, arrivals)
    grad_drive = torch.matmul(B.unsqueeze(-2), adjoint).squeeze(-2)
    _untile(torch.matmul(states, grad_y.unsqueeze(-1)).squeeze(-1), out.C, start)
    _untile(torch.matmul(adjoint, (dt * u).unsqueeze(-1)).squeeze(-1), out.B, start)
    decay.mul_(adjoint)
    decay[1:].mul_(states[:-1])
    decay[0].mul_(entering)
    _untile((decay * A).sum(-2).addcmul_(u, grad_drive), out.dt, start)
    _untile(grad_drive.mul_(dt), out.u, start)
    out.A.add_(decay.mul_(dt.unsqueeze(-2)).sum((0, 1, 2)))
    return leaving
