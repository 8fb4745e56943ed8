"""Convolution and normalisation by rank: `CONV[rank](...)` for 1, 2 and 3 spatial axes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
INSTANCE_NORM: dict[int, type[nn.InstanceNorm1d] | type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}


def check_rank(rank: int) -> int:
    """The rank itself; ConfigError when no convolution of that rank exists."""
    if rank not in CONV:
        raise ConfigError(f"networks have 1, 2 or 3 spatial axes, got {rank}")
    return rank


def same_conv(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    *,
    stride: tuple[int, ...] | int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Convolution with padding kernel // 2 on each axis; the rank is the length of `kernel`."""
    conv = CONV[check_rank(len(kernel))]
    padding = tuple(size // 2 for size in kernel)
    return conv(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)  # type: ignore[arg-type]


def upsample_to(map_: Tensor, stride: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Repeat every cell of (B, C, *space) `stride` times (nearest) and crop the far end to `size`."""
    return crop_to(F.interpolate(map_, scale_factor=tuple(map(float, stride)), mode="nearest"), size)


def pad_to_multiple(map_: Tensor, multiple: Sequence[int]) -> Tensor:
    """(B, C, *space) with edge values repeated at the far ends up to the next multiple, per axis."""
    lacking = [-n % m for n, m in zip(map_.shape[2:], multiple, strict=True)]
    pads = [p for n in reversed(lacking) for p in (0, n)]
    return F.pad(map_, pads, mode="replicate") if any(lacking) else map_


def crop_to(map_: Tensor, space: Sequence[int]) -> Tensor:
    """(B, C, *space) without what lies beyond `space` at the far ends; a view."""
    for axis, length in enumerate(space, start=2):
        map_ = map_.narrow(axis, 0, length)
    return map_


def channels_last(map_: Tensor) -> Tensor:
    """(B, C, *space) -> (B, *space, C), a view."""
    return map_.movedim(1, -1)


def channels_first(map_: Tensor) -> Tensor:
    """(B, *space, C) -> (B, C, *space), a view."""
    return map_.movedim(-1, 1)
