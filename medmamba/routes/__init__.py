"""Routes: the orders in which a scan visits the positions of a grid, by name, for any shape.

`route("snake", (h, w))` gives the order (L,), `inverse(order)` the way back:
`x.flatten(2)[..., order]` is the sequence, `sequence[..., inverse(order)]` the map again.
A new route is one file and one line in `ROUTES`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor

from medmamba.errors import ConfigError
from medmamba.routes.atrous import atrous
from medmamba.routes.column import column
from medmamba.routes.coordinate import coordinate
from medmamba.routes.curves import hilbert, morton
from medmamba.routes.diagonal import diagonal
from medmamba.routes.inside_out import inside_out
from medmamba.routes.multi_scale import multi_scale
from medmamba.routes.order import inverse, order_points
from medmamba.routes.plane_columns import plane_columns
from medmamba.routes.raster import raster
from medmamba.routes.snake import snake
from medmamba.routes.spiral import spiral
from medmamba.routes.window import atrous_window, window

ROUTES: dict[str, Callable[..., Tensor]] = {
    "raster": raster,
    "column": column,
    "plane_columns": plane_columns,
    "snake": snake,
    "diagonal": diagonal,
    "spiral": spiral,
    "atrous": atrous,
    "window": window,
    "atrous_window": atrous_window,
    "multi_scale": multi_scale,
    "coordinate": coordinate,
    "inside_out": inside_out,
    "hilbert": hilbert,
    "morton": morton,
}

STREAMABLE = ("raster", "snake", "plane_columns")  # the first axis slowest, whatever comes before or after a slab

REMEMBERED_POSITIONS = 2**18  # with 64 orders kept: 128 MiB at most


def route(name: str, shape: Sequence[int], **parameters: int | tuple[int, ...]) -> Tensor:
    """Order (L,) of the named route, remembered for shapes of up to 2**18 positions. Do not write into it.

    Raises ConfigError for an unknown name or a bad parameter, ShapeError for a shape the route has no idea of.
    """
    if name not in ROUTES:
        raise ConfigError(f"unknown route {name!r}; known: {', '.join(ROUTES)}")
    sizes = tuple(int(n) for n in shape)
    if math.prod(sizes) > REMEMBERED_POSITIONS:
        return ROUTES[name](sizes, **parameters)
    return _remembered(name, sizes, tuple(sorted(parameters.items())))


@lru_cache(maxsize=64)
def _remembered(name: str, shape: tuple[int, ...], parameters: tuple[tuple[str, int | tuple[int, ...]], ...]) -> Tensor:
    return ROUTES[name](shape, **dict(parameters))


__all__ = ["ROUTES", "STREAMABLE", "inverse", "order_points", "route"]
