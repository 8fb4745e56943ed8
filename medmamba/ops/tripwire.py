"""Names the layer in which the first NaN or infinity appears. Nothing is hooked or paid outside `tripwire`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medmamba.errors import MedMambaError


class NonFiniteError(MedMambaError):
    """A layer received or produced NaN or infinity. `layer` is its path in the watched network."""

    def __init__(self, layer: str, where: str, tensor: Tensor) -> None:
        bad = ~torch.isfinite(tensor.detach())
        share = bad.float().mean().item()
        super().__init__(
            f"layer {layer!r}: {int(bad.sum())} of {tensor.numel()} values ({share:.2%}) of its {where} "
            f"{tuple(tensor.shape)} are NaN or infinite; look at what feeds this layer, and at the learning rate or "
            f"half precision if its input is finite"
        )
        self.layer = layer
        self.where = where


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors anywhere in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _refuse(layer: str, where: str, value: Any) -> None:
    for tensor in _tensors(value):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(layer, where, tensor)


@contextlib.contextmanager
def tripwire(network: nn.Module) -> Iterator[None]:
    """While open, raise NonFiniteError at the first layer whose input, output or gradient of its output is not finite.

    The network's own input is reported as the input of "(network)"; a layer deep inside is reported before the
    blocks around it. Backward belongs inside the context too. Hooks are gone when it closes.
    """

    def watch(name: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            _refuse(name, "input", (args, kwargs))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            _refuse(name, "output", output)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: _refuse(name, "output's gradient", gradient))

        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    handles = [handle for path, module in network.named_modules() for handle in watch(path or "(network)", module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
