"""Coordinate order: sorted by one coordinate first, as point networks sort a cloud along x, y or z."""

from collections.abc import Sequence

from torch import Tensor

from medmamba.errors import ConfigError
from medmamba.routes.raster import raster


def coordinate(shape: Sequence[int], *, axis: int = 0) -> Tensor:
    """Order (L,) by the coordinate along `axis`, ties row-major over the other axes. Any rank."""
    rank = len(tuple(shape))
    if not -rank <= axis < rank:
        raise ConfigError(f"axis={axis}: the shape has {rank} axes")
    first = axis % rank
    return raster(shape, axes=(first, *(other for other in range(rank) if other != first)))
