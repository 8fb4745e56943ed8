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
    all rows before the first result; slabs begin at multiples of `unit`. `up` cells of the result are made of `down` of
    the input, per axis or one number for all; none: one of one."""

    halo: int = 0
    state: bool = False
    statistics: bool = False
    unit: int = 1
    down: tuple[int, ...] = ()
    up: tuple[int, ...] = ()

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


def strided_need(layer: Any) -> Need | None:
    """Of a convolution or pooling with a stride: cut at multiples of it, as far beyond as its kernel reaches."""
    kernel, stride, padding, dilation = (
        _first(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    if getattr(layer, "padding_mode", "zeros") != "zeros" or not isinstance(padding, int):
        return None
    if getattr(layer, "ceil_mode", False) or getattr(layer, "return_indices", False):
        return None
    behind = dilation * (kernel - 1) - padding - stride + 1
    return Need(halo=-(-max(padding, behind, 0) // stride) * stride, down=_tuple(layer.stride))


def transposed_need(layer: Any) -> Need | None:
    """Of a transposed convolution whose result is its stride times as large."""
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    reach = layer.dilation[0] * (kernel - 1)
    if reach + layer.output_padding[0] + 1 != stride + 2 * padding:
        return None
    return Need(halo=-(-max(padding, reach - padding) // stride), up=_tuple(layer.stride))


def upsample_need(layer: Any) -> Need | None:
    """Of nearest or linear up-sampling by a whole factor; with aligned corners a cell looks where the far end tells."""
    factors = layer.scale_factor if isinstance(layer.scale_factor, tuple) else (layer.scale_factor,)
    known = layer.mode in ("nearest", "linear", "bilinear", "trilinear") and not layer.align_corners
    if not known or any(f is None or f != int(f) for f in factors):
        return None
    return Need(halo=1, up=_tuple(layer.scale_factor))


def instance_norm(norm: Any) -> Need:
    """Over the whole map, unless it goes by what training met."""
    return Need(statistics=not norm.track_running_stats)


def whole_map(layer: nn.Module) -> Need:
    return Need(statistics=True)


def mean_of_map(pool: Any) -> Need | None:
    """A pooling to one cell."""
    size = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,)
    return Need(statistics=True) if set(size) == {1} else None


NEEDS: dict[type[nn.Module], Callable[[Any], Need | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), conv_need),
    **dict.fromkeys((nn.Linear, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d), pointwise),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), last_axis),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.ELU), pointwise),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), pointwise),
}
"""Layers whose result has the rows of the input and looks at rows nearby."""

WIDER_NEEDS: dict[type[nn.Module], Callable[[Any], Need | None]] = {
    **NEEDS,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda conv: conv_need(conv) or strided_need(conv)),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), strided_need),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), strided_need),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_need),
    nn.Upsample: upsample_need,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    nn.GroupNorm: whole_map,
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), mean_of_map),
}
"""With those that change the number of rows or look at all of them: for whoever plans layer by layer."""


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


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)
