"""Mamba-FCS: semantic change with joint spatio-frequency fusion and change-guided attention.

Letters: B batch, C channels, H, W the map, K classes.
Definition followed: "Mamba-FCS: Joint Spatio-Frequency Feature Fusion, Change-Guided Attention, and SeK Loss for
Enhanced Semantic Change Detection in Remote Sensing" (2025), its 128 read as the first width. Parameter names are the
official ones, without the cross attention that is built there and never used: see `own_name`. Truth for tests: golden
cases `mambafcs`. Losses: `pipelines.learning.change_losses`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.change_pair import CHANGE, classes_of, resize, split_dates
from medmamba.layers.resnet import BasicBlock
from medmamba.layers.squeeze import SqueezeExcite, maybe_empty_linear
from medmamba.layers.ss2d import initial_weights
from medmamba.nets.changemamba import MakeBlock, PairConfig, PyramidEncoder

REDUCTION = 16  # of the squeeze-and-excite and of the channel attention


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaFCSConfig(PairConfig):
    """Defaults: the released base encoder and SECOND's seven classes; `out_channels` is 2 + 2K."""

    out_channels: int = CHANGE + 2 * 7
    depths: tuple[int, ...] = (2, 2, 15, 2)
    widths: tuple[int, ...] = (128, 256, 512, 1024)

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        if min(self.widths) < REDUCTION:
            raise ConfigError(f"widths {self.widths}: each must be {REDUCTION} or more, the squeeze divides by it")


class Spectrum(nn.Module):
    """log(1 + |FFT|) of a map, scaled orthonormally, then 1 x 1 convolution, batch norm and ReLU. Same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = x.to(torch.promote_types(x.dtype, torch.float32))  # no transform in 16 bits
        return self.proj(torch.fft.fft2(kept, norm="ortho").abs().log1p().to(x.dtype))


class ChannelGate(nn.Module):
    """Each channel times a sigmoid made from the means of its neighbours among the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int(abs((math.log2(channels) + 1) / 2))
        size += 1 - size % 2
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.conv(x.mean(dim=(2, 3))[:, None]).sigmoid()
        return x * weights[:, 0, :, None, None]


class SpatialGate(nn.Module):
    """Each position times a sigmoid made from the largest and the mean channel around it, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)).sigmoid()


class SpectralFusion(nn.Module):
    """Maps of two dates (B, C, H, W) with their spectra and their difference -> one map of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fft_pre = Spectrum(channels)
        self.fft_post = Spectrum(channels)
        self.reduce_conv = nn.Conv2d(5 * channels, channels, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(channels)
        self.ch_gate = ChannelGate(channels)
        self.sp_gate = SpatialGate()

    def forward(self, earlier: Tensor, later: Tensor) -> Tensor:
        parts = [earlier, self.fft_pre(earlier), later, self.fft_post(later), (earlier - later).abs()]
        x = F.relu(self.reduce_bn(self.reduce_conv(torch.cat(parts, dim=1))))
        return self.sp_gate(self.ch_gate(x))


class TwofoldChannelAttention(nn.Module):
    """Each channel times the sum (0 to 2) of the sigmoids made from all means and from all maxima."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // REDUCTION
        squeeze, excite = maybe_empty_linear(channels, hidden), maybe_empty_linear(hidden, channels)
        self.fc = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid())  # empty between for the two scores of change

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc(x.mean(dim=(2, 3))) + self.fc(x.amax(dim=(2, 3)))
        return x * weights[..., None, None]


class MeanFirstSpatialGate(nn.Module):
    """As `SpatialGate`, the mean first and with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)).sigmoid()


class PyramidFusion(nn.Module):
    """(B, channels, H, W) -> (B, out, H, W): views of 1, 3 and 5 pixels, weighed by channel and position, residual."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out), nn.ReLU())
        self.branch3 = nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())
        self.branch5 = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, out, 1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )
        self.channel_att = TwofoldChannelAttention(3 * out)
        self.spatial_att = MeanFirstSpatialGate()
        self.final_conv = nn.Sequential(nn.Conv2d(3 * out, out, 1), nn.BatchNorm2d(out), nn.ReLU())
        self.shortcut: nn.Module = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([self.branch1(x), self.branch3(x), self.branch5(x)], dim=1)
        return self.final_conv(self.spatial_att(self.channel_att(views))) + self.shortcut(x)


class ExcitedBlock(BasicBlock):
    """The residual block with squeeze-and-excite before the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)
        self.se = SqueezeExcite(channels, REDUCTION)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.se(y))


class Climb(nn.Module):
    """Entries of every level (finest first) -> what every level's block gave, from the coarsest up. Same shapes.

    `names` are those of a level's block and of its smoothing, with a place for the level.
    """

    def __init__(self, widths: Sequence[int], make_block: MakeBlock, names: tuple[str, str]) -> None:
        super().__init__()
        self.levels, self.names = len(widths), names
        for level, width in enumerate(widths, start=1):
            self.add_module(names[0].format(level), nn.Sequential(nn.Identity(), make_block(width)))
            if level < self.levels:
                self.add_module(names[1].format(level), ExcitedBlock(width))
            if level > 1:
                self.add_module(f"down_sample_{self.levels + 1 - level}", PyramidFusion(width, widths[level - 2]))

    def climb(self, entries: Sequence[Tensor]) -> list[Tensor]:
        of_block, of_smooth = self.names
        given = [self.get_submodule(of_block.format(self.levels))(entries[-1])]
        for level in range(self.levels - 1, 0, -1):
            narrowed = self.get_submodule(f"down_sample_{self.levels - level}")(given[0])
            summed = entries[level - 1] + resize(narrowed, entries[level - 1].shape[2:])
            smoothed = self.get_submodule(of_smooth.format(level))(summed)
            given.insert(0, self.get_submodule(of_block.format(level))(smoothed))
        return given


class FusedChangeDecoder(Climb):
    """Maps of both dates at every level -> the change map of every level, finest first."""

    def __init__(self, widths: Sequence[int], make_block: MakeBlock) -> None:
        super().__init__(widths, make_block, ("st_block_{}1", "smooth_layer_{}"))
        for level, width in enumerate(widths, start=1):
            self.add_module(f"fuse_layer_{self.levels + 1 - level}", SpectralFusion(width))

    def forward(self, earlier: list[Tensor], later: list[Tensor]) -> list[Tensor]:
        fusions = [self.get_submodule(f"fuse_layer_{self.levels - number}") for number in range(self.levels)]
        return self.climb([fuse(a, b) for fuse, a, b in zip(fusions, earlier, later, strict=True)])


class GuidedSemanticDecoder(Climb):
    """Maps of one date and the change maps, level by level -> (B, C, H, W) at the finest."""

    def __init__(self, widths: Sequence[int], make_block: MakeBlock) -> None:
        super().__init__(widths, make_block, ("st_block_{}_semantic", "smooth_layer_{}_semantic"))
        self.smooth_layer_0_semantic = ExcitedBlock(widths[0])

    def forward(self, maps: list[Tensor], change: list[Tensor]) -> Tensor:
        guided = [map_ * guide.sigmoid() for map_, guide in zip(maps, change, strict=True)]
        return self.smooth_layer_0_semantic(self.climb(guided)[0])


class MambaFCS(nn.Module):
    """Pair (B, 2C, H, W), the earlier date first -> (B, 2 + 2K, H, W) for `layers.change_pair.split_scores`."""

    Config = MambaFCSConfig

    def __init__(self, config: MambaFCSConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.encoder = PyramidEncoder(config.encoder, config.encoder_block)
        self.decoder_bcd = FusedChangeDecoder(widths, config.decoder_block)
        self.decoder_T1 = GuidedSemanticDecoder(widths, config.semantic_block)
        self.decoder_T2 = GuidedSemanticDecoder(widths, config.semantic_block)
        self.main_clf_cd = PyramidFusion(widths[0], CHANGE)
        self.aux_clf = PyramidFusion(widths[0], classes_of(config.out_channels))
        self.apply(initial_weights)

    def forward(self, pair: Tensor) -> Tensor:
        earlier, later = self.encoder.pair(*split_dates(pair, self.config.in_channels))
        change = self.decoder_bcd(earlier, later)
        scores = [
            self.main_clf_cd(change[0]),
            self.aux_clf(self.decoder_T1(earlier, change)),
            self.aux_clf(self.decoder_T2(later, change)),
        ]
        return resize(torch.cat(scores, dim=1), pair.shape[2:])

    @staticmethod
    def own_name(official: str) -> str | None:
        """The same name; None for the published cross attention that takes no part."""
        return None if "cross_attn." in official else official
