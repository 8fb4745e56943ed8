"""Inside-out order: from the centre outwards, shell by shell."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_shape, coordinates, sort_by


def inside_out(shape: Sequence[int]) -> Tensor:
    """Order (L,) by the squared distance to the centre of the grid (in cells), ties row-major. Any rank."""
    sizes = check_shape(shape)
    doubled = 2 * coordinates(sizes) - (torch.tensor(sizes) - 1)  # twice the offset: whole numbers, exact ties
    return sort_by((doubled**2).sum(dim=1))
