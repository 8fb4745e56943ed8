"""U-Mamba: a residual U-Net whose encoder stages ("Enc") or bottleneck ("Bot") end in a Mamba layer, any rank.

Letters in this file: B batch, C channels, L positions of a map in row-major order, M model width, K classes.
Definition followed: Ma, Li, Wang, "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation" (2024).
The Mamba layer has no residual: its result replaces the features. Truth for tests: golden cases umamba.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mamba import Mamba, MambaConfig
from medmamba.layers.nd import CONV, INSTANCE_NORM, check_rank, same_conv
from medmamba.layers.upsampling import UPSAMPLINGS

SLOPE = 0.01  # of every LeakyReLU


@dataclass(frozen=True, slots=True, kw_only=True)
class UMambaConfig:
    """Sizes of a U-Mamba; one entry per stage, `kernels` and `strides` with one number per spatial axis.

    `mamba` says where the Mamba layers are: "encoder" (after every stage) or "bottleneck". A stage of the encoder
    variant with no more positions than channels, told by `image_px`, works on the transposed matrix and then accepts
    that size only. `upsampling` is a name in `layers.upsampling.UPSAMPLINGS`; the published one is "nearest".
    `deep_supervision` gives the scores of every decoder level, finest first.
    """

    in_channels: int = 1
    out_channels: int = 2
    mamba: str = "encoder"
    widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    kernels: tuple[tuple[int, ...], ...] = ((3, 3, 3),) * 6
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1), *((2, 2, 2),) * 5)
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    decoder_blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    image_px: tuple[int, ...] | None = (128, 128, 128)
    upsampling: str = "nearest"
    deep_supervision: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2

    def __post_init__(self) -> None:
        stages = len(self.widths)
        lengths = (len(self.kernels), len(self.strides), len(self.blocks), len(self.decoder_blocks) + 1)
        if set(lengths) != {stages} or stages < 2:
            raise ConfigError(f"{stages} widths want as many kernels, strides, blocks and one decoder less, got {self}")
        if {len(size) for size in (*self.kernels, *self.strides)} != {check_rank(self.spatial_dims)}:
            raise ConfigError(f"kernels and strides must all have {self.spatial_dims} axes, got {self}")
        if self.upsampling not in UPSAMPLINGS:
            raise ConfigError(f"upsampling {self.upsampling!r} unknown; known: {', '.join(UPSAMPLINGS)}")
        if self.mamba not in ("encoder", "bottleneck"):
            raise ConfigError(f"mamba is 'encoder' or 'bottleneck', got {self.mamba!r}")
        if self.mamba == "encoder" and (self.image_px is None or len(self.image_px) != self.spatial_dims):
            raise ConfigError(f"the encoder variant wants image_px with {self.spatial_dims} axes, got {self.image_px}")

    @property
    def spatial_dims(self) -> int:
        return len(self.strides[0])

    @property
    def stage_px(self) -> list[tuple[int, ...]]:
        """Size of every stage's map for an input of `image_px`."""
        sizes, size = [], self.image_px or ()
        for stride in self.strides:
            size = tuple(n // step for n, step in zip(size, stride))
            sizes.append(size)
        return sizes

    def encoder_blocks(self, stage: int) -> int:
        """Blocks of a stage: the deeper half has one, whatever is asked (as published)."""
        return self.blocks[stage] if stage < math.ceil(len(self.widths) / 2) else 1

    def decoder_block_count(self, level: int) -> int:
        """Blocks of a decoder level, deepest first; the later ones have one, whatever is asked (as published)."""
        return self.decoder_blocks[level] if level < math.ceil((len(self.widths) - 1) / 2 + 0.5) else 1


class ProjectedBlock(nn.Module):
    """Residual block that may change width and size: act(norm2(conv2(act(norm1(conv1 x)))) + conv3 x)."""

    def __init__(self, inner: int, outer: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        rank = len(kernel)
        self.conv1 = same_conv(inner, outer, kernel, stride=stride)
        self.norm1 = INSTANCE_NORM[rank](outer, affine=True)
        self.conv2 = same_conv(outer, outer, kernel)
        self.norm2 = INSTANCE_NORM[rank](outer, affine=True)
        self.conv3 = CONV[rank](inner, outer, 1, stride=stride)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.conv3(x), SLOPE)


class ConvNorm(nn.Module):
    """Convolution and instance norm."""

    def __init__(self, width: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = same_conv(width, width, kernel)
        self.norm = INSTANCE_NORM[len(kernel)](width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class PlainBlock(nn.Module):
    """Residual block of one width: act(convnorm2(act(convnorm1 x)) + x)."""

    def __init__(self, width: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, kernel)
        self.conv2 = ConvNorm(width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), SLOPE)) + x, SLOPE)


def block_row(inner: int, outer: int, kernel: tuple[int, ...], stride: tuple[int, ...], count: int) -> nn.Sequential:
    """One projected block and `count` - 1 plain ones."""
    return nn.Sequential(
        ProjectedBlock(inner, outer, kernel, stride), *(PlainBlock(outer, kernel) for _ in range(count - 1))
    )


class MambaLayer(nn.Module):
    """Mamba(LayerNorm(tokens)) of a map (B, C, *space), same shape out, at least in float32.

    Tokens are positions, or with `positions` given (transposed) the channels, each `positions` numbers wide.
    """

    def __init__(self, config: UMambaConfig, width: int, positions: int | None = None) -> None:
        super().__init__()
        self.positions = positions
        model = width if positions is None else positions
        self.norm = nn.LayerNorm(model)
        self.mamba = Mamba(
            MambaConfig(d_model=model, d_state=config.d_state, d_conv=config.d_conv, expand=config.expand)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.positions is None:
            tokens = tokens.transpose(1, 2)
        elif tokens.shape[2] != self.positions:
            raise ShapeError(
                f"this stage reads channels as tokens and was made for {self.positions} positions, got "
                f"{tuple(x.shape[2:])}; give the network windows of its image_px"
            )
        with torch.autocast(x.device.type, enabled=False):
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            mixed: Tensor = self.mamba(self.norm(tokens))
        if self.positions is None:
            mixed = mixed.transpose(1, 2)
        return mixed.reshape(x.shape).to(x.dtype)


class Encoder(nn.Module):
    """Image (B, C, *space) -> the map of every stage, finest first."""

    def __init__(self, config: UMambaConfig) -> None:
        super().__init__()
        widths = (config.widths[0], *config.widths)
        ones = (1,) * config.spatial_dims
        stages = range(len(config.widths))
        self.stem = block_row(config.in_channels, widths[0], config.kernels[0], ones, config.encoder_blocks(0))
        self.stages = nn.ModuleList(
            block_row(widths[s], widths[s + 1], config.kernels[s], config.strides[s], config.encoder_blocks(s))
            for s in stages
        )
        if config.mamba == "encoder":
            sizes = [math.prod(size) for size in config.stage_px]
            transposed = [size if size <= width else None for size, width in zip(sizes, config.widths)]
            layers = (MambaLayer(config, config.widths[s], transposed[s]) for s in stages)
            self.mamba_layers: nn.ModuleList | list[nn.Identity] = nn.ModuleList(layers)
        else:
            self.mamba_layers = [nn.Identity() for _ in stages]

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = self.stem(image), []
        for stage, mamba in zip(self.stages, self.mamba_layers):
            x = mamba(stage(x))
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """Maps finest first -> scores (B, K, *space) of every level, finest first."""

    def __init__(self, config: UMambaConfig) -> None:
        super().__init__()
        widths, kernels, strides = config.widths[::-1], config.kernels[::-1], config.strides[::-1]
        levels = range(len(widths) - 1)
        ones = (1,) * config.spatial_dims
        upsampling = UPSAMPLINGS[config.upsampling]
        self.upsample_layers = nn.ModuleList(upsampling(widths[i], widths[i + 1], strides[i]) for i in levels)
        self.stages = nn.ModuleList(
            block_row(2 * widths[i + 1], widths[i + 1], kernels[i + 1], ones, config.decoder_block_count(i))
            for i in levels
        )
        self.seg_layers = nn.ModuleList(
            CONV[config.spatial_dims](widths[i + 1], config.out_channels, 1) for i in levels
        )

    def forward(self, maps: list[Tensor], all_levels: bool) -> list[Tensor]:
        x, scores = maps[-1], []
        last = len(self.stages) - 1
        for level, skip in enumerate(maps[-2::-1]):
            x = self.stages[level](torch.cat([self.upsample_layers[level](x, skip), skip], dim=1))
            if all_levels or level == last:
                scores.append(self.seg_layers[level](x))
        return scores[::-1]


class UMamba(nn.Module):
    """Image (B, C, *space) -> scores (B, K, *space); with deep supervision a tuple of them, finest first."""

    Config = UMambaConfig

    def __init__(self, config: UMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if config.mamba == "bottleneck":
            self.mamba_layer = MambaLayer(config, config.widths[-1])
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @staticmethod
    def own_name(official: str) -> str | None:
        """Published files repeat the encoder under decoder.encoder and each unit's tensors under all_modules."""
        repeated = official.startswith("decoder.encoder.") or ".all_modules." in official
        return None if repeated else official

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = self.encoder(image)
        if self.config.mamba == "bottleneck":
            maps[-1] = self.mamba_layer(maps[-1])
        scores = self.decoder(maps, self.config.deep_supervision)
        return tuple(scores) if self.config.deep_supervision else scores[0]
