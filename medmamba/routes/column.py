"""Column order: the first axis runs fastest, the last slowest (VMamba's second direction). Any rank."""

from collections.abc import Sequence

from torch import Tensor

from medmamba.routes.raster import raster


def column(shape: Sequence[int]) -> Tensor:
    """Order (L,): column-major, in any rank."""
    return raster(shape, axes=tuple(reversed(range(len(tuple(shape))))))
