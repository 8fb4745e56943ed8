"""Spiral order: clockwise and inward from the first corner, ring by ring (MHS-VM, route S). Two axes only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_shape, coordinates, sort_by


def spiral(shape: Sequence[int]) -> Tensor:
    """Order (L,): top row left to right, right column down, bottom row back, left column up, then the next ring.

    Raises ShapeError for another rank than 2: a spiral is a path of the plane (see `inside_out` for shells).
    """
    sizes = check_shape(shape, rank=2)
    row, column = coordinates(sizes).unbind(1)
    below, right = sizes[0] - 1 - row, sizes[1] - 1 - column
    ring = torch.stack([row, column, below, right]).amin(dim=0)
    high, wide = sizes[0] - 1 - 2 * ring, sizes[1] - 1 - 2 * ring  # steps along a side of the ring
    place = 2 * wide + high + below - ring  # up the left column, unless one of the other sides holds the position
    place = torch.where(below == ring, wide + high + right - ring, place)
    place = torch.where(right == ring, wide + row - ring, place)
    place = torch.where(row == ring, column - ring, place)
    return sort_by(ring, place)
