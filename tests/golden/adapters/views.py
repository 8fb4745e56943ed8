"""Our map modules take (B, C, H, W); published ones often take (B, H, W, C) or tokens. The turning between."""

from collections.abc import Callable

from torch import Tensor, nn

from tests.golden.case import Built, Tensors, Tolerance, from_module

DEFAULT = Tolerance()


class ChannelLast(nn.Module):
    """A map module seen from outside as (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.movedim(-1, 1)).movedim(1, -1)
        return result


class Tokens(nn.Module):
    """A map module seen from outside as (B, H * W, C) -> (B, H * W, C), row-major."""

    def __init__(self, inner: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.space = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.mT.unflatten(-1, self.space)).flatten(2).mT
        return result


def from_channel_last(
    module: nn.Module,
    params: Tensors,
    tolerance: Tolerance = DEFAULT,
    rename: Callable[[str], str] = str,
) -> Built:
    """`from_module` for a case whose input and output are (B, H, W, C)."""
    return from_module(ChannelLast(module), params, rename=lambda name: f"inner.{rename(name)}", tolerance=tolerance)


def from_tokens(module: nn.Module, params: Tensors, height: int, width: int) -> Built:
    """`from_module` for a case whose input and output are (B, H * W, C)."""
    return from_module(Tokens(module, height, width), params, rename=lambda name: f"inner.{name}")
