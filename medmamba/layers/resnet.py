"""Residual backbones of the plane: the basic block of ResNet-18/34 and the grouped bottleneck of ResNeXt.

Letters in this file: B batch, C channels, H, W the map.
Definitions followed: He et al., "Deep Residual Learning" (2016); Xie et al., "Aggregated Residual
Transformations" (2017).
Names are those of the weights that are passed around for these networks. Truth for tests: golden case paratranscnn.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def projection(inner: int, outer: int, stride: int) -> nn.Sequential | None:
    """Pointwise convolution and norm for the short way; None where nothing changes."""
    if inner == outer and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv x)))) + x), convolutions 3 x 3."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = projection(inner, outer, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class GroupedBottleneck(nn.Module):
    """Pointwise to `middle` channels, grouped 3 x 3, pointwise to `outer`; each with norm, ReLU between, residual."""

    def __init__(self, inner: int, middle: int, outer: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = projection(inner, outer, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def basic_stage(inner: int, outer: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; the first one strides."""
    return nn.Sequential(BasicBlock(inner, outer, stride), *(BasicBlock(outer, outer) for _ in range(blocks - 1)))


class ResNeXt(nn.Module):
    """Image (B, C, H, W) -> four maps at strides 4, 8, 16, 32, of `widths` channels."""

    def __init__(
        self, in_channels: int, *, stem: int, widths: tuple[int, ...], blocks: tuple[int, ...], groups: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.levels = len(widths)
        inner = stem
        for level, (outer, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            first = GroupedBottleneck(inner, outer // 2, outer, groups, 1 if level == 1 else 2)
            rest = (GroupedBottleneck(outer, outer // 2, outer, groups) for _ in range(count - 1))
            self.add_module(f"layer{level}", nn.Sequential(first, *rest))
            inner = outer

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1), []
        for level in range(1, self.levels + 1):
            x = self.get_submodule(f"layer{level}")(x)
            maps.append(x)
        return maps
