"""How much memory a case will take, told before it starts, and how much there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from pipelines.case import Case
from pipelines.formats import open_source

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
CGROUP = Path("/sys/fs/cgroup/memory.max")


def parse_bytes(text: str) -> int:
    """Bytes from "4G", "512M", "1.5 GiB". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--ram {text!r}: expected a size such as 4G or 512M")
    return int(float(match[1]) * UNITS[match[2]])


def machine_bytes() -> int:
    """Memory of this machine, or of the control group that holds this process when that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return total


def predicted_bytes(bundle: Bundle, case: Case) -> int:
    """Bytes of the arrays that `predict` holds at once for this case, from the headers alone.

    On the file's grid: labels (int32), their copy turned for the picture, and the copy read back. On the network's
    grid: scores and weights of the rows a window covers, twice (blended and handed on). In the window loop: one batch.
    The network's own activations are not in it: when they do not fit, the window loop steps down by itself.
    """
    preprocessing = bundle.preprocessing
    role = next((r for r in preprocessing.roles if r in case.files), None)
    if role is None:
        return 0
    grid = open_source(case.files[role]).grid
    seen = preprocessing.shape_for(grid.permute(*preprocessing.axes(grid)))
    window = preprocessing.windowing.size
    rows = min(seen[0], window[0])
    plane = int(np.prod([max(n, w) for n, w in zip(seen[1:], window[1:])], dtype=object))
    voxels = int(np.prod(grid.shape, dtype=object))
    return 12 * voxels + 2 * 4 * (bundle.classes + 1) * rows * plane


def require_memory(bundle: Bundle, case: Case, budget: int) -> None:
    """Raises InputError("too_large") when the case's arrays alone exceed `budget` bytes."""
    needed = predicted_bytes(bundle, case)
    if needed > budget:
        raise InputError(
            "too_large", f"case {case.id}: needs about {needed >> 20} MiB, {budget >> 20} MiB may be used; raise --ram"
        )
