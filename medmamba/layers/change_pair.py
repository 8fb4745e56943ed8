"""Two dates in one tensor, and what change networks do with them; maps (B, C, H, W).

The house's form of a pair is a stack (B, 2C, H, W), the earlier date first. A network for semantic change gives
(B, 2 + 2K, H, W): scores of unchanged and changed, then of the K classes at the earlier and at the later date.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError

CHANGE = 2  # scores of unchanged and changed


def split_dates(pair: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(B, 2C, H, W) -> the earlier and the later image (B, C, H, W). Raises ShapeError unless 2C is `channels`."""
    if pair.ndim != 4 or pair.shape[1] != channels or channels % 2:
        raise ShapeError(f"pair of dates {tuple(pair.shape)}: wanted (B, {channels}, H, W), the earlier date first")
    earlier, later = pair.chunk(2, dim=1)
    return earlier, later


def classes_of(out_channels: int) -> int:
    """K of a semantic network's 2 + 2K outputs. Raises ConfigError when no K gives that number."""
    if out_channels < CHANGE + 4 or out_channels % 2:
        raise ConfigError(
            f"out_channels={out_channels}: semantic change has 2 + 2K of them, K >= 2 classes at either date "
            "(class 0 stands for unchanged)"
        )
    return (out_channels - CHANGE) // 2


def split_scores(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 2 + 2K, ...) -> change (B, 2, ...), classes (B, K, ...) at the earlier and at the later date."""
    classes = classes_of(scores.shape[1])
    change, earlier, later = scores.split([CHANGE, classes, classes], dim=1)
    return change, earlier, later


def resize(map_: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Bilinear, corners not aligned, to `size` (H, W)."""
    return F.interpolate(map_, tuple(size), mode="bilinear", align_corners=False)


def alternate_columns(earlier: Tensor, later: Tensor) -> Tensor:
    """(B, C, H, 2W): even columns from the earlier map, odd ones from the later."""
    return torch.stack([earlier, later], dim=-1).flatten(-2)


def part_columns(map_: Tensor) -> tuple[Tensor, Tensor]:
    """The two maps that `alternate_columns` wove together."""
    return map_[..., 0::2], map_[..., 1::2]
