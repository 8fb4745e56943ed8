"""What a streamed image takes, told before it is read: bytes of the largest slab, bytes of scratch on the disk.

Every pass is worked once for a slab in the middle on tensors without data (`memory.LiveBytes`), which costs a fraction
of a second and no memory whatever the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medmamba.memory import LiveBytes
from medmamba.stream_pass import Pass, Place
from medmamba.stream_plan import plan, scratch_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCost:
    """Bytes of one sweep over an image: `slab` in memory, at most; `scratch` on the disk, at most."""

    slab: int
    scratch: int


@torch.no_grad()
def stream_cost(network: nn.Module, channels: int, shape: Sequence[int], rows: int) -> StreamCost:
    """The cost of streaming an image of `shape` in slabs of `rows` rows through a network from `without_data`.

    Raises ConfigError naming a part that cannot stream.
    """
    passes = plan(network, channels, shape)
    like = next(network.parameters(), torch.empty(0))
    return StreamCost(
        slab=max(_slab_bytes(p, rows, like.dtype) for p in passes),
        scratch=scratch_numbers(passes) * like.element_size(),
    )


def _slab_bytes(p: Pass, rows: int, dtype: torch.dtype) -> int:
    """What is read, and all that lives beside it while the pass works."""
    slabs = p.slabs(rows)
    first, last = slabs[len(slabs) // 2]
    shown = p.shown((first, last))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def state(of: Pass) -> torch.Tensor:
        return empty(*of.state, dtype=of.state_dtype or dtype)

    parts = [empty(1, high - low, *s.row) for s, (low, high) in zip(p.reads, shown, strict=True)]
    at = Place(
        rows=slice(first - shown[0][0], last - shown[0][0]),
        starts=tuple(start for start, _ in shown),
        carried=state(p) if p.state else None,
        behind=state(p.sweep) if p.sweep else None,
        whole=state(p.sweep) if p.sweep else None,
        sums=tuple(map(state, p.sums)),
    )
    with LiveBytes(parts) as live:
        p.work(parts, at)
    return live.peak() + sum(math.prod(part.shape) for part in parts) * parts[0].element_size()
