"""Plane by plane, column by column inside each plane: the raster's partner among the orders that can be streamed."""

from collections.abc import Sequence

from torch import Tensor

from medmamba.routes.order import check_shape
from medmamba.routes.raster import raster


def plane_columns(shape: Sequence[int]) -> Tensor:
    """Order (L,): the first axis slowest, then the last, ..., the second axis fastest. Any rank; the raster for 2."""
    rank = len(check_shape(shape))
    return raster(shape, axes=(0, *reversed(range(1, rank))))
