"""Convolutions that round alike whatever they are shown: one window, a batch, a slab of an image or the whole of it.

On a CPU torch gives a batch of one with few cells to its own convolution by columns, all else to oneDNN. The two round
differently, and the first is some five times slower and wants 3^d times the memory of the map. `one_dnn` opens the
surroundings in which oneDNN does them all, backward too.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FEW = 20480  # torch: a batch of one with up to so many channels x cells of the first two axes goes to its own form


def one_dnn(x: Tensor) -> AbstractContextManager[Any]:
    """To be opened around a network that is shown x (B, ...); does nothing where torch takes oneDNN by itself."""
    alone = x.device.type == "cpu" and x.shape[0] == 1 and torch.backends.mkldnn.is_available()
    return _OneDnn() if alone else nullcontext()


class _OneDnn(TorchDispatchMode):
    """Convolutions of one image (1, C, *two or three axes), float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = args
            if by_columns(x, transposed, groups):
                return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        if func is torch.ops.aten.convolution_backward.default:
            grad, x, *others = args
            transposed, groups = args[7], args[9]
            if by_columns(x, transposed, groups):  # tensors in oneDNN's own layout are given to oneDNN
                found = func(grad.to_mkldnn(), x.to_mkldnn(), *others)
                return tuple(g.to_dense() if g is not None and g.is_mkldnn else g for g in found)
        return func(*args, **(kwargs or {}))


def by_columns(x: Tensor, transposed: bool, groups: int) -> bool:
    """Whether torch would not take oneDNN for x (B, C, *space) though oneDNN could."""
    if transposed or groups > 1 or x.dim() not in (4, 5) or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.shape[0] == 1 and math.prod(x.shape[:4]) <= FEW
