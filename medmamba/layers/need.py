"""What rows of a layer's result want beyond the same rows of its input: the declaration that streaming is planned from.

Rows run along the first spatial axis. Torch's own layers are told here; ours carry a `need` of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from medmamba.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """`halo` rows of the input before and behind; `state` carried from row to row, both ways; `statistics` summed over
    all rows before the first result; slabs begin at multiples of `unit`."""

    halo: int = 0
    state: bool = False
    statistics: bool = False
    unit: int = 1

    def __add__(self, other: Need) -> Need:
        """The need of one layer after another."""
        return Need(
            halo=self.halo + other.halo,
            state=self.state or other.state,
            statistics=self.statistics or other.statistics,
            unit=math.lcm(self.unit, other.unit),
        )


def conv_need(conv: Any) -> Need | None:
    """Half the kernel of a stride-1 convolution with zero padding; others are cut at multiples of their stride."""
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    plain = conv.stride[0] == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return Need(halo=reach // 2) if plain and reach % 2 == 0 and conv.padding[0] == reach // 2 else None


def last_axis(norm: Any) -> Need | None:
    """A norm over the last axis, which is never that of the rows."""
    return Need() if len(norm.normalized_shape) == 1 else None


def pointwise(layer: nn.Module) -> Need:
    return Need()


NEEDS: dict[type[nn.Module], Callable[[Any], Need | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), conv_need),
    **dict.fromkeys((nn.Linear, nn.Identity, nn.Dropout), pointwise),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), last_axis),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh), pointwise),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), pointwise),
}


def need_of(layer: nn.Module, name: str) -> Need:
    """The need of a layer, or of its parts one after another. Raises ConfigError naming the part that cannot stream."""
    known = NEEDS.get(type(layer), lambda own: getattr(own, "need", None))
    declared = known(layer)
    if declared is not None:
        return declared
    children = list(layer.named_children())
    if not children or type(layer) in NEEDS or hasattr(layer, "need"):
        raise ConfigError(f"{name} ({type(layer).__name__}) cannot be streamed; use windows, or another part")
    total = Need()
    for part, child in children:
        total = total + need_of(child, f"{name}.{part}" if name else part)
    return total
