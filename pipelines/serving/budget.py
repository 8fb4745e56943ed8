"""How much memory a case will take, told before it starts, and how much there is."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from medmamba.memory import LiveBytes, without_data
from medmamba.stream import ROWS
from medmamba.stream_cost import StreamCost, stream_cost
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source
from pipelines.networks import NETWORKS
from pipelines.report import peak_memory_mb

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MOST_WINDOWS = 8  # in a batch that the budget chooses: more is no faster
LARGE_BLOCK, M_MMAP_THRESHOLD = 4 << 20, -3
KERNELS = 48 << 20  # of a sweep: work space inside operations and holes of the allocator, measured at 48^2 to 160^2
CGROUP = Path("/sys/fs/cgroup/memory.max")


def return_large_blocks() -> None:
    """Makes glibc give blocks of LARGE_BLOCK and more back to the system when they are freed.

    By itself it raises that threshold to 32 MiB, and the maps of a network leave holes in the heap: 100 MiB more in the
    window loop at 96^3 x 5 classes. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def take_large_pages() -> None:
    """Makes torch ask for large pages: blocks that were given back come anew, and page by page that takes a network of
    two convolutions as long again. Torch looks once, when it makes its first tensor. A sweep's slabs are too small for
    it: its peak would grow with their number."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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


def predicted_bytes(bundle: Bundle, case: Case, mode: str = "windows") -> int:
    """Bytes of the arrays that `predict` holds at once for this case, from the headers alone: what the loop holds, and
    on the file's grid labels, their copy turned for the picture, and the copy read back."""
    shapes = _shapes(bundle, case)
    return 12 * int(np.prod(shapes[0], dtype=object)) + loop_bytes(bundle, shapes[1], mode) if shapes else 0


def predicted_scratch(bundle: Bundle, case: Case, mode: str) -> int:
    """Bytes of disk that the maps of a streamed case take at once, at most; windows need none."""
    shapes = _shapes(bundle, case)
    return streamed(bundle, shapes[1]).scratch if shapes and mode == "stream" else 0


def _shapes(bundle: Bundle, case: Case) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Of the file's grid and of what the network sees; None for a case without a file that it knows."""
    preprocessing = bundle.preprocessing
    role = next((r for r in preprocessing.roles if r in case.files), None)
    if role is None:
        return None
    grid = open_source(case.files[role]).grid
    return grid.shape, preprocessing.shape_for(grid.permute(*preprocessing.axes(grid)))


def loop_bytes(bundle: Bundle, shape: tuple[int, ...], mode: str, strip: int | None = None) -> int:
    """Bytes that the loop over an image of `shape` (as the network sees it) holds at once. By windows: scores and input
    of the rows of a strip that a window covers, two windows, one shown and one read ahead, and the maps of the network
    that live at once. Streamed: the largest slab, its rows as they are read, and KERNELS."""
    channels, windowing = len(bundle.preprocessing.channels), bundle.preprocessing.windowing
    if mode == "stream":
        return KERNELS + streamed(bundle, shape).slab + 2 * 4 * channels * ROWS * int(np.prod(shape[1:], dtype=object))
    padded = tuple(max(n, w) for n, w in zip(shape, windowing.size, strict=True))
    widest = max((seen.size for seen, _ in windowing.strips(padded, strip)), key=lambda size: size[1:])
    plane = int(np.prod(widest[1:], dtype=object))
    windows = 2 * 4 * channels * int(np.prod(windowing.size, dtype=object))
    return 4 * (bundle.classes + channels) * windowing.size[0] * plane + windows + network_bytes(bundle)


@lru_cache(maxsize=64)
def streamed(bundle: Bundle, shape: tuple[int, ...]) -> StreamCost:
    """What streaming an image of `shape` takes; nothing known (0) of a network that cannot be tried without data.

    Raises ConfigError naming a part that cannot stream.
    """
    try:
        return stream_cost(bundle.outline(NETWORKS), len(bundle.preprocessing.channels), shape, ROWS)
    except (RuntimeError, NotImplementedError):
        return StreamCost(slab=0, scratch=0)


def window_bytes(bundle: Bundle) -> int:
    """What one more window in a batch takes: shown, read ahead, and the network's maps; 0 where these are unknown."""
    channels, window = len(bundle.preprocessing.channels), bundle.preprocessing.windowing.size
    maps = network_bytes(bundle)
    return maps and maps + 2 * 4 * channels * int(np.prod(window, dtype=object))


def fitting_batch(bundle: Bundle, needed: int, budget: int) -> int:
    """The largest number of windows at once, up to MOST_WINDOWS, with which the largest case (`needed` bytes with one)
    stays in `budget` bytes; 1 where it is unknown what a window takes."""
    one = window_bytes(bundle)
    return 1 + max(0, min(MOST_WINDOWS - 1, (budget - needed) // one)) if one else 1


def network_bytes(bundle: Bundle) -> int:
    """Largest sum of maps that live at once while the network looks at one window, found on tensors without data; 0 for
    a network that cannot be tried so."""
    preprocessing = bundle.preprocessing
    shape = (1, len(preprocessing.channels), *preprocessing.windowing.network_size)
    return _live_bytes(bundle.network, json.dumps(dict(bundle.config), sort_keys=True), shape)


@lru_cache(maxsize=16)
def _live_bytes(name: str, config: str, shape: tuple[int, ...]) -> int:
    try:
        network = without_data(lambda: NETWORKS[name](json.loads(config))).eval()
        image = torch.empty(*shape, device="meta")
        with LiveBytes([image, *network.parameters(), *network.buffers()]) as live, torch.no_grad():
            network(image)
    except (RuntimeError, NotImplementedError, KeyError):  # an operation that wants data, or a network of a test
        return 0
    return live.peak()


def memory_line(bundle: Bundle, needed: int, scratch: int, mode: str, batch: int, budget: int) -> str:
    """What the largest case will take above this process (`needed` bytes with one window), and what it may."""
    how = "streamed" if mode == "stream" else f"with {batch} windows at once"
    most = needed + (0 if mode == "stream" else (batch - 1) * window_bytes(bundle))
    disk = f" and {scratch / 2**20:.0f} MiB of scratch on the disk" if scratch else ""
    return (
        f"memory: {peak_memory_mb():.0f} MiB now + {most / 2**20:.0f} MiB for the largest case {how}{disk}, "
        f"{budget >> 20} MiB may be used"
    )


def require_disk(output: Path, needed: int) -> None:
    """Raises InputError("no_space") when `needed` bytes would not fit where `output` is, which is made."""
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise InputError(
            "no_space", f"{output}: {free >> 20} MiB free, this case needs {needed >> 20} MiB; free some disk"
        )


def require_memory(case: Case, needed: int, budget: int) -> None:
    """Raises InputError("too_large") when the case's arrays alone (`needed` bytes) exceed `budget` bytes."""
    if needed > budget:
        raise InputError(
            "too_large", f"case {case.id}: needs about {needed >> 20} MiB, {budget >> 20} MiB may be used; raise --ram"
        )
