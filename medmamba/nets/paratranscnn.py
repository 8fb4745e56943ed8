"""ParaTransCNN: a residual CNN and a transformer pyramid side by side, joined level by level in the decoder.

Letters in this file: B batch, C channels, K classes, d width of the transformer's first level, H, W the image.
Definition followed: Sun et al., "ParaTransCNN: Parallelized TransCNN Encoder for Medical Image Segmentation" (2024).
No position embedding, so any size works. Truth for tests: golden case paratranscnn.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.attention import SelfAttention
from medmamba.layers.resnet import basic_stage

MULTIPLE = 16  # smaller images are padded with zeros at the far ends up to a multiple of this
SQUEEZE = 16  # the channel weights are read through this many times fewer channels


@dataclass(frozen=True, slots=True, kw_only=True)
class ParaTransCNNConfig:
    """Sizes: `widths` and `blocks` of the CNN (as published ResNet-34), `depths` of the three transformer levels."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 9
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    dim: int = 320
    depths: tuple[int, int, int] = (3, 3, 3)
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if (len(self.widths), len(self.blocks), len(self.depths)) != (4, 4, 3):
            raise ConfigError(f"wanted four widths, four block counts and three depths, got {self}")


class PreNorm(nn.Module):
    """LayerNorm, then `fn`."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fn(x)
        return out


class FeedForward(nn.Module):
    """Tokens through twice their width, with dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        first, second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.net = nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    """Attention and feed-forward in turn on the pixels of a map (B, C, H, W)."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for _ in range(depth):
            steps += [SelfAttention(width, heads, qkv_bias=False), FeedForward(width, dropout)]
        self.net = nn.Sequential(*(Residual(PreNorm(width, step)) for step in steps))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.net(x.flatten(2).mT)
        return tokens.mT.reshape(x.shape)


class ChannelWeights(nn.Module):
    """x (B, C, H, W) times one weight in 0..1 per channel, read from the channels' means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // SQUEEZE
        if hidden == 0:
            raise ConfigError(f"the channel weights want {SQUEEZE} channels or more, got {width}")
        first, second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.fc = nn.Sequential(first, nn.ReLU(), second, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.fc(x.mean(dim=(2, 3)))[..., None, None]
        return out


class Joint(nn.Module):
    """Twice: convolution 3 x 3, batch norm, ReLU; the width stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm3(self.conv3(F.relu(self.norm1(self.conv1(x))))))


class ParaTransCNN(nn.Module):
    """Image (B, C, H, W) -> scores (B, K, H, W), any size."""

    Config = ParaTransCNNConfig

    def __init__(self, config: ParaTransCNNConfig) -> None:
        super().__init__()
        self.config = config
        d, widths = config.dim, config.widths
        self.firstconv = nn.Conv2d(config.in_channels, widths[0], 7, 2, 3, bias=False)
        self.firstbn = nn.BatchNorm2d(widths[0])
        inner = widths[0]
        for level, (outer, blocks) in enumerate(zip(widths, config.blocks), start=1):
            self.add_module(f"encoder{level}", basic_stage(inner, outer, blocks, 1 if level == 1 else 2))
            inner = outer
        self.patch_embed_1 = nn.Conv2d(config.in_channels, d, 4, 4)
        self.patch_embed_2 = nn.Conv2d(d, 2 * d, 2, 2)
        self.patch_embed_3 = nn.Conv2d(2 * d, 4 * d, 2, 2)
        for level, depth in enumerate(config.depths, start=1):
            tokens = Transformer(d * 2 ** (level - 1), depth, config.heads, config.dropout)
            self.add_module(f"vit_{level}", tokens)
        joined = (4 * d + widths[3], 2 * d + widths[2], d + widths[1])
        raised = joined[1]
        for number, width in enumerate(joined, start=1):
            self.add_module(f"SE_{number}", ChannelWeights(width))
            self.add_module(f"decoder{number}", Joint(width if number == 1 else width + raised))
        self.up3_1 = nn.ConvTranspose2d(joined[0], raised, 2, 2)
        self.up2_1 = nn.ConvTranspose2d(2 * raised, raised, 2, 2)
        self.up1_1 = nn.ConvTranspose2d(joined[2] + raised, d, 4, 4)
        self.out = nn.Conv2d(d, config.out_channels, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        """The joined maps of both encoders, deepest (1/16 of the image) first."""
        cnn, tokens, joined = F.relu(self.firstbn(self.firstconv(image))), image, []
        cnn = self.get_submodule("encoder1")(cnn)
        for level in (1, 2, 3):
            cnn = self.get_submodule(f"encoder{level + 1}")(cnn)
            tokens = self.get_submodule(f"vit_{level}")(self.get_submodule(f"patch_embed_{level}")(tokens))
            joined.append(self.get_submodule(f"SE_{4 - level}")(torch.cat([tokens, cnn], dim=1)))
        return joined[::-1]

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4:
            raise ShapeError(f"ParaTransCNN wants (B, C, H, W), got {tuple(image.shape)}")
        height, width = image.shape[2:]
        deep, middle, fine = self.encode(F.pad(image, (0, -width % MULTIPLE, 0, -height % MULTIPLE)))
        x = self.up3_1(self.get_submodule("decoder1")(deep))
        x = self.up2_1(self.get_submodule("decoder2")(torch.cat([middle, x], dim=1)))
        x = self.up1_1(self.get_submodule("decoder3")(torch.cat([fine, x], dim=1)))
        scores: Tensor = self.out(x)
        return scores[..., :height, :width]
