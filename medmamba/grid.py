"""Where an array lies: shape, affine and frame, for any rank; no pixels.

Affine: maps the integer index in ARRAY order (slowest first) to world coordinates at the CENTRE of the cell, so a
volume `(z, y, x)` has its z step in column 0. World order is the frame's own (x, y[, z]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmamba.errors import GeometryError

RAS = "RAS+ mm"
PIXELS = "pixels"


@dataclass(frozen=True, eq=False)
class Grid:
    """`shape` (n,), `affine` (n+1, n+1) float64 read-only, `frame` text (`RAS+ mm`, `pixels`, `EPSG:...`, WKT2)."""

    shape: tuple[int, ...]
    affine: np.ndarray
    frame: str = PIXELS

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        rank = len(shape)
        if rank == 0 or min(shape) < 1:
            raise GeometryError(f"grid shape {shape}: every axis must have at least one cell")
        if affine.shape != (rank + 1, rank + 1):
            raise GeometryError(f"affine of shape {affine.shape} does not fit rank {rank}; expected {(rank + 1,) * 2}")
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:rank, :rank])) < 1e-30:
            raise GeometryError(f"affine is not finite or not invertible: {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring cell centres along each array axis, in the frame's unit."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:-1, :-1], axis=0))

    @property
    def cell_volume(self) -> float:
        """Length, area or volume of one cell (shear counted), in the frame's unit to the rank."""
        return float(abs(np.linalg.det(self.affine[:-1, :-1])))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        same = self.shape == other.shape and self.frame == other.frame
        return same and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes(), self.frame))

    def corners(self) -> np.ndarray:
        """World coordinates of the centres of the 2^n corner cells, (2^n, n)."""
        index = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(self.rank, -1)
        return (self.affine[:-1, :-1] @ index + self.affine[:-1, -1:]).T

    def matches(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Same shape and frame, and no corner further off than `tolerance` of the smallest cell side."""
        if self.shape != other.shape or self.frame != other.frame:
            return False
        return bool(np.abs(self.corners() - other.corners()).max() <= tolerance * min(self.spacing))

    def crop(self, start: Sequence[int], shape: Sequence[int]) -> Grid:
        """The box that begins at index `start` (negative pads) and has `shape` cells."""
        affine = self.affine.copy()
        affine[:-1, -1] += affine[:-1, :-1] @ np.asarray(start, dtype=np.float64)
        return Grid(tuple(shape), affine, self.frame)

    def pad(self, before: Sequence[int], after: Sequence[int]) -> Grid:
        """Cells added in front of and behind each axis."""
        return self.crop([-b for b in before], [b + n + a for b, n, a in zip(before, self.shape, after, strict=True)])

    def zoom(self, shape: Sequence[int]) -> Grid:
        """The same box of space (cell edges kept) cut into `shape` cells."""
        factor = np.array(self.shape, dtype=np.float64) / np.array(shape, dtype=np.float64)
        affine = self.affine.copy()
        affine[:-1, -1] += affine[:-1, :-1] @ ((factor - 1) / 2)
        affine[:-1, :-1] = affine[:-1, :-1] * factor
        return Grid(tuple(shape), affine, self.frame)

    def permute(self, order: Sequence[int], flips: Sequence[bool]) -> Grid:
        """Array axes taken in `order`, then each new axis reversed where `flips` says so."""
        affine = self.affine[:, [*order, self.rank]].copy()
        shape = tuple(self.shape[a] for a in order)
        for axis, flip in enumerate(flips):
            if flip:
                affine[:-1, -1] += affine[:-1, axis] * (shape[axis] - 1)
                affine[:-1, axis] *= -1
        return Grid(shape, affine, self.frame)
