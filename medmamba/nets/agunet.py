"""AGUNet: a 3D U-Net with attention gates on its skips, an image pyramid and scores at every decoder level.

Letters in this file: B batch, C channels, K classes.
Definition followed: Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention
mechanisms" (2021). Weights are published in Keras form: `from_keras` turns names and layouts.
Truth for tests: golden case agunet_daunet.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError

EPS, MOMENTUM = 1e-3, 0.01  # of every batch norm, as in Keras
KERAS_KINDS = {nn.Conv3d: "conv3d", nn.ConvTranspose3d: "conv3d_transpose", nn.BatchNorm3d: "batch_normalization"}
KERAS_PARTS = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AGUNetConfig:
    """One width per level, the last is the bottom. `pyramid` shows every level the image at its own resolution.

    `deep_supervision` gives the scores of every decoder level, finest first.
    """

    spatial_dims: ClassVar[int] = 3
    in_channels: int = 1
    out_channels: int = 2
    widths: tuple[int, ...] = (16, 32, 128, 256, 256)
    pyramid: bool = True
    deep_supervision: bool = False

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise ConfigError(f"AGUNet wants two widths or more, got {self.widths}")

    @property
    def multiple(self) -> int:
        """The sides of an image are multiples of this many voxels."""
        return int(2 ** (len(self.widths) - 1))


def batch_norm(width: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(width, eps=EPS, momentum=MOMENTUM)


class Block(nn.Module):
    """Twice: convolution 3 x 3 x 3, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inner, outer, 3, padding=1)
        self.norm1 = batch_norm(outer)
        self.conv2 = nn.Conv3d(outer, outer, 3, padding=1)
        self.norm2 = batch_norm(outer)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Level(nn.Module):
    """A block of the encoder; with `image_channels` it also sees the shrunk image, convolved to its width."""

    def __init__(self, inner: int, outer: int, image_channels: int = 0) -> None:
        super().__init__()
        self.image_conv = nn.Conv3d(image_channels, outer, 3, padding=1) if image_channels else None
        self.block = Block(inner + (outer if image_channels else 0), outer)

    def forward(self, x: Tensor, image: Tensor, shrink: int) -> Tensor:
        if self.image_conv is not None:
            shown = F.relu(self.image_conv(F.avg_pool3d(image, shrink)))
            x = torch.cat([shown, x], dim=1)
        out: Tensor = self.block(x)
        return out


class AttentionGate(nn.Module):
    """The skip (B, C, *space) times one weight per voxel in 0..1, read from the skip and from below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.below_conv = nn.Conv3d(width, half, 1)
        self.skip_conv = nn.Conv3d(width, half, 1)
        self.below_norm = batch_norm(half)
        self.skip_norm = batch_norm(half)
        self.conv = nn.Conv3d(2 * half, 1, 1)
        self.norm = batch_norm(1)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        both = [self.below_norm(self.below_conv(below)), self.skip_norm(self.skip_conv(skip))]
        return skip * torch.sigmoid(self.norm(self.conv(F.relu(torch.cat(both, dim=1)))))


def upsampling(inner: int, outer: int) -> nn.ConvTranspose3d:
    """Transposed convolution 3 x 3 x 3; its result is cut to twice the size by `cut` (Keras "same")."""
    return nn.ConvTranspose3d(inner, outer, 3, stride=2)


def cut(x: Tensor, size: torch.Size) -> Tensor:
    """The first entries of every spatial axis of (B, C, *space), `size` of them."""
    return x[..., : size[0], : size[1], : size[2]]


class UpLevel(nn.Module):
    """Up-sample, gate the skip, concatenate, block."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.up = upsampling(inner, outer)
        self.norm = batch_norm(outer)
        self.gate = AttentionGate(outer)
        self.block = Block(2 * outer, outer)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.relu(self.norm(cut(self.up(x), skip.shape[2:])))
        out: Tensor = self.block(torch.cat([x, self.gate(x, skip)], dim=1))
        return out


def encode(levels: nn.ModuleList, image: Tensor) -> list[Tensor]:
    """The map of every encoder level, finest first; max pooling by two between them."""
    x, maps = image, []
    for number, level in enumerate(levels):
        x = level(x if number == 0 else F.max_pool3d(x, 2), image, 2**number)
        maps.append(x)
    return maps


def encoder(config: AGUNetConfig) -> nn.ModuleList:
    """All levels; the first sees the image itself and the bottom never sees the pyramid."""
    widths = (config.in_channels, *config.widths)
    last = len(config.widths) - 1
    shown = [config.in_channels if config.pyramid and 0 < i < last else 0 for i in range(last + 1)]
    return nn.ModuleList(Level(a, b, image) for (a, b), image in zip(pairwise(widths), shown))


def check_size(image: Tensor, multiple: int) -> None:
    """ShapeError unless the image is (B, C, z, y, x) with sides that can be halved as often as needed."""
    if image.ndim != 5 or any(n % multiple or n == 0 for n in image.shape[2:]):
        raise ShapeError(f"wanted (B, C, z, y, x) with sides a multiple of {multiple}, got {tuple(image.shape)}")


class AGUNet(nn.Module):
    """Volume (B, C, z, y, x) -> scores before the softmax (B, K, z, y, x), or a tuple of them, finest first."""

    Config = AGUNetConfig

    def __init__(self, config: AGUNetConfig) -> None:
        super().__init__()
        self.config = config
        deepest_first = config.widths[::-1]
        self.encoder = encoder(config)
        self.decoder = nn.ModuleList(UpLevel(a, b) for a, b in pairwise(deepest_first))
        scored = deepest_first[1:] if config.deep_supervision else config.widths[:1]
        self.heads = nn.ModuleList(nn.Conv3d(width, config.out_channels, 1) for width in scored)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_size(image, self.config.multiple)
        maps = encode(self.encoder, image)
        x, decoded = maps[-1], []
        for level, skip in zip(self.decoder, maps[-2::-1]):
            x = level(x, skip)
            decoded.append(x)
        scores = [head(map_) for head, map_ in zip(self.heads, decoded[-len(self.heads) :])]
        return tuple(scores[::-1]) if self.config.deep_supervision else scores[0]

    def own_tensors(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a Keras file (`conv3d_2/kernel`, as `from_keras` says), or of our own."""
        return own_tensors(self, published)


def keras_names(network: nn.Module) -> dict[str, str]:
    """Our module names in the order Keras numbers its layers: `conv3d`, `conv3d_1`, ... -> `encoder.0.block.conv1`."""
    names: dict[str, str] = {}
    counts = dict.fromkeys(KERAS_KINDS.values(), 0)
    for ours, module in network.named_modules():
        if (kind := KERAS_KINDS.get(type(module))) is not None:  # type: ignore[arg-type]
            names[f"{kind}_{counts[kind]}".removesuffix("_0")] = ours
            counts[kind] += 1
    return names


def from_keras(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Published name -> our name and tensor; kernels turn from (*space, in, out) to (out, in, *space).

    A transposed kernel is (*space, out, in) there and (in, out, *space) here: the same turn. The tensors are those of a
    whole file. ConfigError names a layer that the network does not have.
    """
    names = keras_names(network)
    counted = from_zero({official.partition("/")[0] for official in tensors})
    turned = {}
    for official, tensor in tensors.items():
        published, _, part = official.partition("/")
        layer = counted[published]
        if layer not in names or part not in KERAS_PARTS:
            raise ConfigError(f"tensor {official!r} has no place in this {type(network).__name__}; change its settings")
        value = tensor.permute(4, 3, 0, 1, 2).contiguous() if part == "kernel" else tensor
        turned[official] = (f"{names[layer]}.{KERAS_PARTS[part]}", value)
    return turned


def from_zero(layers: Iterable[str]) -> dict[str, str]:
    """Layer names counted from zero in every kind: Keras counts on through all networks of a process."""
    numbers = {layer: kind_and_number(layer) for layer in layers}
    first = {kind: min(n for k, n in numbers.values() if k == kind) for kind, _ in numbers.values()}
    return {layer: f"{kind}_{n - first[kind]}".removesuffix("_0") for layer, (kind, n) in numbers.items()}


def kind_and_number(layer: str) -> tuple[str, int]:
    """`conv3d_2` -> `conv3d`, 2; a name without a number is the first of its kind, 0."""
    kind, _, number = layer.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (layer, 0)


def own_tensors(network: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`from_keras` for tensors with Keras names, which have a slash; others as they are."""
    keras = all("/" in name for name in published)
    return dict(from_keras(network, published).values()) if keras else dict(published)
