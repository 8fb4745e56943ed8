"""A slab convolved as the whole image would be.

Torch chooses between oneDNN and its own convolution by the size of what it is shown, and the two round differently (and
a slab of few channels gets the form that is five times slower). While this is open, sizes count as those of the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 20480  # torch: batch x channels x first two axes up to this go to its own form


class WholeConvolution(TorchDispatchMode):
    """Convolutions of (B, C, rows, ...) inside take the form they would take on an image of `rows` rows; only those of
    `rank` axes, others do not see slabs."""

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.rows, self.rank = rows, rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self._large(args[0], args[6]):
            x, weight, bias, stride, padding, dilation, _, _, groups = args
            return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))

    def _large(self, x: Tensor, transposed: bool) -> bool:
        """Whether torch gives the whole image to oneDNN but not this slab of it."""
        if transposed or x.dim() != self.rank + 2 or x.dim() < 4 or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        shown, others = math.prod(x.shape[:4]), math.prod((*x.shape[:2], x.shape[3]))
        return torch.backends.mkldnn.is_available() and x.shape[0] == 1 and shown <= SMALL < others * self.rows
