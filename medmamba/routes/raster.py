"""Raster orders: every axis swept in one direction, the order of the axes chosen."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.errors import ConfigError
from medmamba.routes.order import check_shape


def check_axes(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The axes, slowest first; the natural order for None. Raises ConfigError when they are no permutation."""
    chosen = tuple(range(rank)) if axes is None else tuple(axes)
    if sorted(chosen) != list(range(rank)):
        raise ConfigError(f"axes={chosen}: expected a permutation of {tuple(range(rank))}, slowest axis first")
    return chosen


def raster(shape: Sequence[int], *, axes: Sequence[int] | None = None) -> Tensor:
    """Order (L,): row-major for `axes=None`; else the axes are named from slowest to fastest. Any rank."""
    sizes = check_shape(shape)
    steps = torch.arange(math.prod(sizes)).reshape(sizes)
    return steps.permute(check_axes(axes, len(sizes))).reshape(-1)
