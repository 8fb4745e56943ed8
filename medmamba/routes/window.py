"""Window orders: one window after the other, so that near positions stay near in the sequence.

Source: LocalMamba-style windowed scanning; the atrous form visits the skip-sampled subsets inside each window.
"""

from collections.abc import Sequence

from torch import Tensor

from medmamba.routes.order import check_shape, coordinates, flat_index, per_axis, sort_by


def window(shape: Sequence[int], *, size: int | Sequence[int] = 4) -> Tensor:
    """Order (L,): windows of `size` positions a side in row-major order, row-major inside each. Any rank.

    Windows at the far borders hold what is left.
    """
    sizes = check_shape(shape)
    sides = per_axis("size", size, len(sizes))
    return sort_by(_window_number(sizes, sides))


def atrous_window(shape: Sequence[int], *, size: int | Sequence[int] = 4, rate: int | Sequence[int] = 2) -> Tensor:
    """Order (L,): windows in row-major order; inside each, the subset of every phase of `rate` in turn. Any rank."""
    sizes = check_shape(shape)
    sides, rates = per_axis("size", size, len(sizes)), per_axis("rate", rate, len(sizes))
    coords = coordinates(sizes)
    inside = coords % coords.new_tensor(sides)
    return sort_by(_window_number(sizes, sides), flat_index(inside % coords.new_tensor(rates), rates))


def _window_number(sizes: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Row-major number (L,) of the window each position lies in."""
    coords = coordinates(sizes)
    counts = [-(-n // side) for n, side in zip(sizes, sides, strict=True)]
    return flat_index(coords // coords.new_tensor(sides), counts)
