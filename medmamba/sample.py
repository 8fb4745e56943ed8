"""One travelling value: an array with its grid, its valid mask and its channel names; or a set of points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medmamba.errors import ShapeError
from medmamba.grid import RAS, Grid


@dataclass(frozen=True, eq=False)
class Image:
    """`array` (C, *space); `grid` of the same space; `valid` (*space) bool or None = all valid; one name a channel."""

    array: np.ndarray
    grid: Grid
    channels: tuple[str, ...]
    valid: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (len(self.channels), *self.grid.shape)
        if self.array.shape != expected:
            raise ShapeError(f"image array has shape {self.array.shape}, its channels and grid say {expected}")
        if self.valid is not None and self.valid.shape != self.grid.shape:
            raise ShapeError(f"valid mask has shape {self.valid.shape}, the grid says {self.grid.shape}")


@dataclass(frozen=True, eq=False)
class Points:
    """`xyz` (N, 3) in `frame`, `features` (N, F)."""

    xyz: np.ndarray
    features: np.ndarray
    frame: str = RAS

    def __post_init__(self) -> None:
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3 or len(self.features) != len(self.xyz):
            raise ShapeError(
                f"points xyz {self.xyz.shape} and features {self.features.shape} do not fit (N, 3) and (N, F)"
            )
