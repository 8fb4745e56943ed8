"""Memory that the allocator keeps for later, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back_free_memory() -> None:
    """Gives back what is free in glibc's heap: it keeps the holes that small maps leave, and large maps do not fit into
    them. Elsewhere nothing happens."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
