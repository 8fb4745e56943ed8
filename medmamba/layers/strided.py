"""The ordinary way in, and ways down and up, of a U-Net of halves: convolution, strided and transposed convolution.

The last two cannot be undone: with them a network is the non-invertible twin of a reversible one ("stored" and
"stages" only). A state is (a, b, *skips) of streams (B, *space, C / 2); both halves together are the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba.layers.grid import Snap, dense
from medmamba.layers.nd import CONV, CONV_TRANSPOSE, channels_first, channels_last, same_conv
from medmamba.layers.reversible import State, Step


class Stem(nn.Module):
    """Image (B, C, *space) -> two snapped halves (B, *space, width / 2) by a 3^d convolution."""

    def __init__(self, channels: int, width: int, rank: int) -> None:
        super().__init__()
        self.conv = same_conv(channels, width, (3,) * rank)

    def forward(self, x: Tensor, snap: Snap) -> State:
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return halves(snap(channels_last(self.conv(x.contiguous(memory_format=last)))))


class StridedDown(Step):
    """Halves of `width` -> halves of `wider` channels on the coarser map; the two old halves stay behind as skips."""

    def __init__(self, width: int, wider: int, strides: Sequence[int]) -> None:
        super().__init__()
        step = self.unit = tuple(strides)
        self.conv = CONV[len(step)](width, wider, step, step)  # type: ignore[arg-type]

    def forward(self, state: State, snap: Snap) -> State:
        a, b = halves(snap(channels_last(self.conv(channels_first(torch.cat(state[:2], -1))))))
        return a, b, *state


class StridedUp(Step):
    """The way back: transposed convolution, the skips added."""

    takes = 4

    def __init__(self, wider: int, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        step = tuple(strides)
        self.conv = CONV_TRANSPOSE[len(step)](wider, width, step, step)  # type: ignore[arg-type]

    def forward(self, state: State, snap: Snap) -> State:
        a, b = halves(snap(channels_last(self.conv(channels_first(torch.cat(state[:2], -1))))))
        return a + state[2], b + state[3], *state[4:]


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """A map (B, *space, C) as two dense streams."""
    a, b = both.chunk(2, dim=-1)
    return dense(a), dense(b)
