"""Diagonal order: positions by the sum of their coordinates, the direction turning from one diagonal to the next.

Source: MHS-VM, routes X (2-D: even diagonals run from bottom-left to top-right); other ranks use planes of equal sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_shape, coordinates, sort_by


def diagonal(shape: Sequence[int]) -> Tensor:
    """Order (L,): by coordinate sum; inside an odd diagonal row-major, inside an even one its reverse. Any rank."""
    total = coordinates(check_shape(shape)).sum(dim=1)
    rank_inside = torch.arange(total.shape[0])
    return sort_by(total, torch.where(total % 2 == 0, -rank_inside, rank_inside))
