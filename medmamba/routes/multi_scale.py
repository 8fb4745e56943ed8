"""Multi-scale order: the coarsest lattice first, then what each finer lattice adds (each position once)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_parameter, check_shape, coordinates, sort_by


def multi_scale(shape: Sequence[int], *, levels: int = 3) -> Tensor:
    """Order (L,): positions on the lattice of spacing 2**(levels-1), then 2**(levels-2), ..., 1. Any rank.

    Inside a level row-major; `levels=1` is the raster.
    """
    sizes = check_shape(shape)
    check_parameter("levels", levels)
    coords = coordinates(sizes)
    level = torch.zeros(coords.shape[0], dtype=torch.long)
    for step in range(1, levels):
        level += (coords % 2**step == 0).all(dim=1)
    return sort_by(-level)
