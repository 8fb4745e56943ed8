"""Atrous order (skip sampling): the grid is split into rate**R coarse grids, visited one after the other.

Source: EfficientVMamba, atrous selective scan. Positions `rate` apart on the last axis
are neighbours in the sequence.
"""

from collections.abc import Sequence

from torch import Tensor

from medmamba.routes.order import check_shape, coordinates, flat_index, per_axis, sort_by


def atrous(shape: Sequence[int], *, rate: int | Sequence[int] = 2) -> Tensor:
    """Order (L,): phases (coordinates modulo `rate`) in row-major order, row-major inside each. Any rank."""
    sizes = check_shape(shape)
    rates = per_axis("rate", rate, len(sizes))
    coords = coordinates(sizes)
    return sort_by(flat_index(coords % coords.new_tensor(rates), rates))
