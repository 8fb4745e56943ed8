"""What every route shares: coordinates of a shape, the inverse of an order, the order of points by their cells.

Letters: L number of positions (product of the shape), R rank of the shape, N points.
A route is a function `route(shape, **parameters) -> order (L,)`: `order[s]` is the row-major index visited at step s.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError


def check_shape(shape: Sequence[int], *, rank: int | None = None) -> tuple[int, ...]:
    """The shape as a tuple of positive ints; ShapeError when it is empty, has an axis below 1 or another rank."""
    sizes = tuple(int(n) for n in shape)
    if not sizes or min(sizes) < 1:
        raise ShapeError(f"shape {sizes}: a route needs one axis or more, each of 1 or more positions")
    if rank is not None and len(sizes) != rank:
        raise ShapeError(
            f"shape {sizes} has {len(sizes)} axes; this route exists for {rank} only: choose another route"
        )
    return sizes


def check_parameter(name: str, value: int, *, least: int = 1) -> int:
    """The value; ConfigError when it is below `least`."""
    if value < least:
        raise ConfigError(f"{name}={value}: a route wants {least} or more")
    return value


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One int per axis from an int or a sequence. Raises ConfigError for a wrong count or a value below 1."""
    values = (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != rank:
        raise ConfigError(f"{name}={values}: give one number or {rank}, one for each axis")
    for one in values:
        check_parameter(name, one)
    return values


def coordinates(shape: Sequence[int]) -> Tensor:
    """Coordinates (L, R) of every position, in row-major order."""
    axes = [torch.arange(n) for n in shape]
    return torch.stack([grid.reshape(-1) for grid in torch.meshgrid(*axes, indexing="ij")], dim=1)


def flat_index(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """Row-major index (N,) of integer coordinates (N, R)."""
    index = torch.zeros(coords.shape[0], dtype=torch.long)
    for axis, n in enumerate(shape):
        index = index * n + coords[:, axis]
    return index


def sort_by(*keys: Tensor) -> Tensor:
    """Order (L,) that sorts positions by the first key, ties by the second, ..., then row-major. Keys are (L,) each."""
    order = torch.arange(keys[0].shape[0])
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def inverse(order: Tensor) -> Tensor:
    """The step (L,) at which each flat position is visited: `inverse(order)[order[s]] == s`."""
    steps = torch.empty_like(order)
    steps[order] = torch.arange(order.shape[0], device=order.device)
    return steps


def order_points(cells: Tensor, shape: Sequence[int], order: Tensor) -> Tensor:
    """Order (N,) of points from the route over the grid of their cells; points in one cell keep their given order.

    cells: integer cell of each point, (N, R), inside `shape`; order: (L,) a route over `shape`.
    Raises ShapeError when a cell lies outside the shape or the order has another length.
    """
    sizes = check_shape(shape)
    if cells.ndim != 2 or cells.shape[1] != len(sizes):
        raise ShapeError(f"cells {tuple(cells.shape)}: expected (N, {len(sizes)}) for the grid {sizes}")
    if order.shape[0] != math.prod(sizes):
        raise ShapeError(f"order of {order.shape[0]} steps does not fit the grid {sizes}")
    if cells.numel() and (bool((cells < 0).any()) or bool((cells >= torch.tensor(sizes)).any())):
        raise ShapeError(f"a point lies in a cell outside the grid {sizes}; clip the cells or enlarge the grid")
    return torch.argsort(inverse(order)[flat_index(cells.long(), sizes)], stable=True)
