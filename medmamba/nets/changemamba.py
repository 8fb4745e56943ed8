"""ChangeMamba: MambaBCD and MambaSCD, binary and semantic change between two dates on VMamba blocks.

Letters: B batch, C channels of one date, H, W the map, w the decoder's width, K classes.
Definition followed: Chen et al., "ChangeMamba: Remote Sensing Change Detection with Spatio-Temporal State Space Model"
(2024). Parameter names are the official ones. Truth for tests: golden cases `changemamba`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.change_pair import CHANGE, alternate_columns, classes_of, part_columns, resize, split_dates
from medmamba.layers.resnet import BasicBlock
from medmamba.layers.ss2d import ChannelNorm, Stage, initial_weights
from medmamba.nets.vmamba import VMambaConfig, block, downsampling, patch_embedding

MakeBlock = Callable[[int], nn.Module]  # width -> a block that keeps the shape of its map


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """The Siamese encoder of the change networks; `in_channels` counts both dates. Defaults: the tiny one.

    `drop_path` is that of the decoders' blocks.
    """

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 6
    out_channels: int = CHANGE
    depths: tuple[int, ...] = (2, 2, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    state: int = 1
    ratio: float = 2.0
    dt_rank: int | None = None
    conv: int = 3
    conv_bias: bool = False
    gate: bool = False
    mlp_ratio: float = 4.0
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        if self.in_channels < 2 or self.in_channels % 2:
            raise ConfigError(f"in_channels={self.in_channels}: two dates of as many channels each are stacked")
        _ = self.encoder  # raises where its settings do not fit

    @property
    def encoder(self) -> VMambaConfig:
        """What one date is encoded with."""
        return VMambaConfig(
            in_channels=self.in_channels // 2,
            depths=self.depths,
            widths=self.widths,
            patch=self.patch,
            state=self.state,
            ratio=self.ratio,
            dt_rank=self.dt_rank,
            conv=self.conv,
            conv_bias=self.conv_bias,
            gate=self.gate,
            mlp_ratio=self.mlp_ratio,
        )

    def encoder_block(self, width: int) -> nn.Module:
        """A block of the encoder."""
        return block(self.encoder, width)

    def decoder_block(self, width: int) -> nn.Module:
        """A block of the change decoder."""
        return block(self.encoder, width, drop_path=self.drop_path)

    def semantic_block(self, width: int) -> nn.Module:
        """A block of the two semantic decoders, which see one date each."""
        return self.decoder_block(width)


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaBCDConfig(PairConfig):
    """Defaults: the tiny encoder. `width` is the decoder's at every level."""

    width: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSCDConfig(MambaBCDConfig):
    """Defaults: the tiny encoder and SECOND's seven classes; `out_channels` is 2 + 2K."""

    out_channels: int = CHANGE + 2 * 7


class PyramidEncoder(nn.Module):
    """Image (B, C, H, W) -> the map of every stage before its downsampling, normalised; the finest first."""

    def __init__(self, config: VMambaConfig, make_block: MakeBlock) -> None:
        super().__init__()
        self.patch_embed = patch_embedding(config)
        down = [*(downsampling(a, b) for a, b in pairwise(config.widths)), None]
        self.layers = nn.ModuleList(
            Stage([make_block(width) for _ in range(depth)], after)
            for depth, width, after in zip(config.depths, config.widths, down, strict=True)
        )
        for number, width in enumerate(config.widths):
            self.add_module(f"outnorm{number}", ChannelNorm(width))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(image), []
        for number, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            x = stage.blocks(x)
            maps.append(self.get_submodule(f"outnorm{number}")(x))
            x = stage.downsample(x)
        return maps

    def pair(self, earlier: Tensor, later: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Both dates through the same weights."""
        halves = [map_.chunk(2) for map_ in self(torch.cat([earlier, later]))]
        return [half[0] for half in halves], [half[1] for half in halves]


def pointwise(channels: int, out: int) -> nn.Sequential:
    """1 x 1 convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out), nn.ReLU())


def projected(channels: int, width: int, make_block: MakeBlock) -> nn.Sequential:
    """1 x 1 convolution, then a block. The empty place keeps the official numbering."""
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.Identity(), make_block(width))


class ChangeDecoder(nn.Module):
    """Maps of both dates at every level -> (B, w, H, W) at the finest.

    At a level the two maps are scanned stacked on channels, woven column by column, and side by side.
    """

    def __init__(self, widths: Sequence[int], width: int, make_block: MakeBlock) -> None:
        super().__init__()
        self.levels = len(widths)
        for level, channels in enumerate(widths, start=1):
            for kind, inner in enumerate((2 * channels, channels, channels), start=1):
                self.add_module(f"st_block_{level}{kind}", projected(inner, width, make_block))
            self.add_module(f"fuse_layer_{level}", pointwise(5 * width, width))
            if level < self.levels:
                self.add_module(f"smooth_layer_{level}", BasicBlock(width, width))

    def fuse(self, level: int, earlier: Tensor, later: Tensor) -> Tensor:
        """The three scans of one level and their fusion."""
        stacked, woven, beside = (self.get_submodule(f"st_block_{level}{kind}") for kind in (1, 2, 3))
        views = [
            stacked(torch.cat([earlier, later], dim=1)),
            *part_columns(woven(alternate_columns(earlier, later))),
            *beside(torch.cat([earlier, later], dim=-1)).chunk(2, dim=-1),
        ]
        return self.get_submodule(f"fuse_layer_{level}")(torch.cat(views, dim=1))

    def forward(self, earlier: list[Tensor], later: list[Tensor]) -> Tensor:
        p = self.fuse(self.levels, earlier[-1], later[-1])
        for level in range(self.levels - 1, 0, -1):
            fused = self.fuse(level, earlier[level - 1], later[level - 1])
            p = self.get_submodule(f"smooth_layer_{level}")(fused + resize(p, fused.shape[2:]))
        return p


class SemanticDecoder(nn.Module):
    """Maps of one date at every level -> (B, w, H, W) at the finest."""

    def __init__(self, widths: Sequence[int], width: int, make_block: MakeBlock) -> None:
        super().__init__()
        self.levels = len(widths)
        self.add_module(f"st_block_{self.levels}_semantic", projected(widths[-1], width, make_block))
        for level, channels in enumerate(widths[:-1], start=1):
            self.add_module(f"trans_layer_{level}", pointwise(channels, width))
            self.add_module(f"smooth_layer_{level}_semantic", BasicBlock(width, width))
            self.add_module(f"st_block_{level}_semantic", nn.Sequential(nn.Identity(), make_block(width)))
        self.smooth_layer_0_semantic = BasicBlock(width, width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        p = self.get_submodule(f"st_block_{self.levels}_semantic")(maps[-1])
        for level in range(self.levels - 1, 0, -1):
            entry = self.get_submodule(f"trans_layer_{level}")(maps[level - 1])
            p = self.get_submodule(f"smooth_layer_{level}_semantic")(entry + resize(p, entry.shape[2:]))
            p = self.get_submodule(f"st_block_{level}_semantic")(p)
        return self.smooth_layer_0_semantic(p)


class MambaBCD(nn.Module):
    """Pair (B, 2C, H, W), the earlier date first -> scores of unchanged and changed (B, 2, H, W), any H and W."""

    Config: type[MambaBCDConfig] = MambaBCDConfig

    def __init__(self, config: MambaBCDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PyramidEncoder(config.encoder, config.encoder_block)
        self.decoder = ChangeDecoder(config.widths, config.width, config.decoder_block)
        self.main_clf = nn.Conv2d(config.width, config.out_channels, 1)
        self.apply(initial_weights)

    def forward(self, pair: Tensor) -> Tensor:
        maps = self.encoder.pair(*split_dates(pair, self.config.in_channels))
        return resize(self.main_clf(self.decoder(*maps)), pair.shape[2:])


class MambaSCD(nn.Module):
    """Pair (B, 2C, H, W) -> (B, 2 + 2K, H, W), read with `layers.change_pair.split_scores`; any H and W."""

    Config: type[MambaBCDConfig] = MambaSCDConfig

    def __init__(self, config: MambaBCDConfig) -> None:
        super().__init__()
        self.config = config
        widths, width = config.widths, config.width
        self.encoder = PyramidEncoder(config.encoder, config.encoder_block)
        self.decoder_bcd = ChangeDecoder(widths, width, config.decoder_block)
        self.decoder_T1 = SemanticDecoder(widths, width, config.semantic_block)
        self.decoder_T2 = SemanticDecoder(widths, width, config.semantic_block)
        self.main_clf_cd = nn.Conv2d(config.width, CHANGE, 1)
        self.aux_clf = nn.Conv2d(config.width, classes_of(config.out_channels), 1)
        self.apply(initial_weights)

    def forward(self, pair: Tensor) -> Tensor:
        earlier, later = self.encoder.pair(*split_dates(pair, self.config.in_channels))
        scores = [
            self.main_clf_cd(self.decoder_bcd(earlier, later)),
            self.aux_clf(self.decoder_T1(earlier)),
            self.aux_clf(self.decoder_T2(later)),
        ]
        return resize(torch.cat(scores, dim=1), pair.shape[2:])
