"""What every reader asks before it believes a file: is it there, as large as its header claims, and where does it lie.

No voxel is read and no memory taken before these are answered; each refusal is an InputError with its code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmamba.errors import GeometryError, InputError
from medmamba.grid import RAS, Grid

DEFLATE = 1032  # no deflate stream grows by more than this factor
LARGEST_COORDINATE = 1e5  # mm; nothing that is scanned lies 100 m away: a unit is wrong


def require_file(path: Path) -> None:
    """Raises InputError unless the file exists, may be read, holds a byte, and is gzip when it is named so."""
    if not path.exists():
        raise InputError("missing_file", f"{path}: no such file; correct the manifest or bring it back")
    if not os.access(path, os.R_OK):
        raise InputError("permission", f"{path}: may not be read; give this user read permission")
    if path.stat().st_size == 0:
        raise InputError("corrupt_file", f"{path}: 0 bytes; copy it again")
    if path.name.lower().endswith(".gz") and not is_gzip(path):
        raise InputError("corrupt_file", f"{path}: is named .gz but is not gzip; rename or copy it again")


def require_size(path: Path, data: Path, claimed: int, *, packed: bool = False) -> None:
    """The data file must hold the bytes that the header claims; a packed one at least what deflate can give."""
    if not data.exists():
        raise InputError("missing_file", f"{path}: its data file {data.name} is missing; bring the pair back")
    present = data.stat().st_size * (DEFLATE if packed or is_gzip(data) else 1)
    if present < claimed:
        raise InputError(
            "corrupt_file", f"{path}: the header claims {claimed} bytes, the file can hold {present}; copy it again"
        )


def require_beside(path: Path, name: str) -> Path:
    """The data file that a header names: it must lie in the header's own folder or below."""
    data = path.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError("bad_header", f"{path}: names a data file outside its folder ({name!r}); move both together")
    return data


def file_shape(path: Path, shape: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    """Spatial shape (x, y, z) and number of volumes of a file's shape; a plane is one slice.

    Raises InputError("bad_header") for an axis without cells, ("wrong_channels") for more than 4 axes.
    """
    sizes = tuple(int(n) for n in shape)
    if not sizes or min(sizes) < 1:
        raise InputError("bad_header", f"{path}: dimensions {sizes}; every one must be at least 1")
    extra = [n for n in sizes[3:] if n != 1]
    if len(extra) > 1:
        raise InputError("wrong_channels", f"{path}: {len(sizes)} dimensions {sizes}; expected 3 or 4")
    x, y, z = (*sizes, 1, 1)[:3]
    return (x, y, z), extra[0] if extra else 1


def file_grid(path: Path, spatial: tuple[int, int, int], affine: np.ndarray, *, mm: float = 1.0) -> Grid:
    """The grid (z, y, x) in RAS+ mm of a file whose axes are x, y, z and whose `affine` leads to RAS in units of `mm`.

    Raises InputError("bad_geometry") for an affine that no scanner wrote.
    """
    turned = np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]].copy()
    turned[:3] *= mm
    try:
        grid = Grid(spatial[::-1], turned, RAS)
    except GeometryError as error:
        raise InputError("bad_geometry", f"{path}: {error}; repair the header") from None
    if min(grid.spacing) <= 0 or min(grid.spacing) < 1e-6 * max(grid.spacing):
        raise InputError("bad_geometry", f"{path}: spacing {grid.spacing} mm; repair the header")
    if np.abs(grid.corners()).max() > LARGEST_COORDINATE:
        far = np.abs(grid.corners()).max()
        raise InputError("bad_geometry", f"{path}: a corner lies {far:.3g} mm from the origin; repair affine or unit")
    return grid


def require_numbers(path: Path, stored: np.dtype) -> None:
    """Raises InputError unless voxels are integers or floats."""
    if stored.kind not in "iuf":
        raise InputError("unsupported_format", f"{path}: voxels of type {stored}; expected integers or floats")


def is_gzip(path: Path) -> bool:
    """By its first two bytes, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
