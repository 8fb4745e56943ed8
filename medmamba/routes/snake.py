"""Snake (boustrophedon): a continuous sweep, every step moves by one position along one axis.

Source: PlainMamba, continuous 2-D scanning (orders 1 and 3; 2 and 4 are their time reverses); in any rank it is the
reflected mixed-radix Gray code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.routes.order import check_shape
from medmamba.routes.raster import check_axes


def snake(shape: Sequence[int], *, axes: Sequence[int] | None = None) -> Tensor:
    """Order (L,): the fastest axis turns at every line, so does each outer one. `axes`: slowest first. Any rank."""
    sizes = check_shape(shape)
    chosen = check_axes(axes, len(sizes))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    order = torch.zeros(1, dtype=torch.long)
    for axis in chosen:
        line = torch.arange(sizes[axis]) * strides[axis]
        back = torch.arange(order.shape[0])[:, None] % 2 == 1
        order = (order[:, None] + torch.where(back, line.flip(0), line)).reshape(-1)
    return order
