"""What the headers of a volume's files tell before a voxel is read: whether the bundle takes them, cells, disk."""

from __future__ import annotations

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from medmamba.grid import Grid
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source

AT_MOST = 6  # bytes a voxel of products on disk


def headers(bundle: Bundle, case: Case) -> tuple[int, int]:
    """Cells of the case's grid, and bytes of disk that its products take at most. Raises InputError, OSError."""
    contract = bundle.preprocessing
    present = contract.present(case.files)
    sources = {role: open_source(case.files[role]) for role in present}
    first = sources[present[0]].grid
    for channel in (c for c in contract.channels if c.role in present):
        source = sources[channel.role]
        if channel.volume is None and len(source.channels) != 1:
            raise InputError("wrong_channels", f"{source.path}: {len(source.channels)} channels, 1 is wanted")
        if not source.grid.matches(first):
            raise InputError("grid_mismatch", f"{source.path}: another grid than role {present[0]!r}")
    return int(np.prod(first.shape, dtype=object)), product_bytes(first)


def product_bytes(grid: Grid) -> int:
    """Bytes of disk that the products on this grid take at most."""
    return AT_MOST * int(np.prod(grid.shape, dtype=object))
