"""Space-filling curves: Morton (bits of the coordinates interleaved) and Hilbert (continuous on a power-of-two cube).

Source of the Hilbert index: J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004): coordinates to
the transposed index by exchanges and inversions, then a Gray code. A shape that is no power-of-two cube takes the curve
of the enclosing cube and leaves out what lies outside, so it then jumps at some steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.errors import ShapeError
from medmamba.routes.order import check_shape, coordinates, sort_by

INDEX_BITS = 62  # what an int64 key holds


def morton(shape: Sequence[int]) -> Tensor:
    """Order (L,) along the Z-order curve; the first axis gives the highest bit of each group. Any rank."""
    sizes = check_shape(shape)
    bits = _bits(sizes)
    return sort_by(_interleave(coordinates(sizes), bits))


def hilbert(shape: Sequence[int]) -> Tensor:
    """Order (L,) along the Hilbert curve of the enclosing power-of-two cube. Any rank."""
    sizes = check_shape(shape)
    bits = _bits(sizes)
    return sort_by(_interleave(_hilbert_transpose(coordinates(sizes), bits), bits))


def _bits(sizes: tuple[int, ...]) -> int:
    """Bits per axis of the enclosing cube. Raises ShapeError when the key would not fit 62 bits."""
    bits = max(1, (max(sizes) - 1).bit_length())
    if bits * len(sizes) > INDEX_BITS:
        raise ShapeError(f"shape {sizes} needs {bits * len(sizes)} bits for its curve, {INDEX_BITS} are there")
    return bits


def _interleave(coords: Tensor, bits: int) -> Tensor:
    """Key (L,) from coordinates (L, R): bit b of every axis side by side, the highest b first."""
    key = torch.zeros(coords.shape[0], dtype=torch.long)
    for bit in reversed(range(bits)):
        for axis in range(coords.shape[1]):
            key = (key << 1) | ((coords[:, axis] >> bit) & 1)
    return key


def _hilbert_transpose(coords: Tensor, bits: int) -> Tensor:
    """Skilling's transposed Hilbert index (L, R) of coordinates (L, R)."""
    x = coords.clone()
    rank = x.shape[1]
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for axis in range(rank):
            high = (x[:, axis] >> bit) & 1 == 1
            swap = torch.where(high, torch.zeros_like(x[:, 0]), (x[:, 0] ^ x[:, axis]) & low)
            x[:, 0] ^= torch.where(high, torch.full_like(swap, low), swap)
            if axis:  # axis 0 exchanged with itself stays as it is
                x[:, axis] ^= swap
    for axis in range(1, rank):
        x[:, axis] ^= x[:, axis - 1]
    turn = torch.zeros_like(x[:, 0])
    for bit in reversed(range(1, bits)):
        turn ^= torch.where((x[:, rank - 1] >> bit) & 1 == 1, (1 << bit) - 1, 0)
    return x ^ turn[:, None]
