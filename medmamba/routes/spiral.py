"""Spiral order: clockwise and inward from the first corner, ring by ring (MHS-VM, route S). Two axes only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_shape


def spiral(shape: Sequence[int]) -> Tensor:
    """Order (L,): top row left to right, right column down, bottom row back, left column up, then the next ring.

    Raises ShapeError for another rank than 2: a spiral is a path of the plane (see `inside_out` for shells).
    """
    sizes = check_shape(shape, rank=2)
    rest = torch.arange(sizes[0] * sizes[1]).reshape(sizes)
    rows = []
    while rest.numel():
        rows.append(rest[0])
        rest = rest[1:].rot90(1)  # what is left is turned anticlockwise, so the next side is again its top row
    return torch.cat(rows)
