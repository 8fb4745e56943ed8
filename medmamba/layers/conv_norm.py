"""A convolution of the plane with what usually follows it."""

from collections.abc import Callable

from torch import Tensor, nn


class ConvNorm(nn.Module):
    """conv, BatchNorm (left out with `norm=False`), activation (None: none).

    Maps (B, C, H, W), padded by (size - 1) // 2.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, (size - 1) // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.activation is None else self.activation(x)
