"""D-Former: a 3D U-shaped transformer that attends within boxes and, in turn, within interleaved lattices.

Letters in this file: B batch, C channels, K classes, d, h, w token axes, e width of the first stage.
Definition followed: Wu et al., "D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation" (2022).
As published, the interval only decides the padding of a lattice; its step is the padded size over the group size.
Truth for tests: golden case dformer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.attention import SelfAttention, TokenMlp
from medmamba.layers.groups import Groups, contiguous, cut_ends, interleaved, multiple_of, pad_ends, padded_positions
from medmamba.layers.nd import channels_first, channels_last
from medmamba.layers.patches import PatchEmbed, PatchExpand, pad_image

Sizes = tuple[int, int, int]
HIDDEN_KEY = -1e6  # added to the scores of padded keys
CORNERS = tuple((d, h, w) for d in (0, 1) for h in (0, 1) for w in (0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DFormerConfig:
    """Sizes, one entry per stage; `group` and `patch` in tokens and voxels along z, y, x.

    `deep_supervision` gives the scores of the last decoder levels too, finest first.
    """

    spatial_dims: ClassVar[int] = 3
    in_channels: int = 1
    out_channels: int = 14
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    intervals: tuple[int, ...] = (8, 4, 2, 1)
    patch: Sizes = (2, 4, 4)
    group: Sizes = (4, 4, 4)
    mlp_ratio: float = 4.0
    deep_supervision: bool = False

    def __post_init__(self) -> None:
        if len({len(self.depths), len(self.heads), len(self.intervals)}) != 1 or len(self.depths) < 2:
            raise ConfigError(f"wanted as many depths as heads and intervals, two or more, got {self}")
        if len(self.patch) != 3 or len(self.group) != 3:
            raise ConfigError(f"patch and group have three axes, got {self.patch} and {self.group}")

    @property
    def stages(self) -> int:
        return len(self.depths)

    @property
    def multiples(self) -> tuple[int, ...]:
        """Images are padded with zeros at the far ends up to these multiples, and the scores cropped."""
        return tuple(n * 2 ** (self.stages - 1) for n in self.patch)


def local_groups(space: torch.Size, group: Sizes) -> tuple[Groups, tuple[int, ...], bool]:
    """Boxes of `group` tokens; also the padded sides and whether padded keys are hidden."""
    sides = tuple(multiple_of(n, g) for n, g in zip(space, group))
    return contiguous(sides, group), sides, sides != tuple(space)


def global_groups(space: torch.Size, group: Sizes, interval: int) -> tuple[Groups, tuple[int, ...], bool]:
    """Lattices of about `group` tokens; padded keys are hidden only when h or w is padded, as published."""
    padded = [multiple_of(n, interval) for n in space]
    steps = [max(n // g, 1) for n, g in zip(padded, group)]
    sides = tuple(multiple_of(n, step) for n, step in zip(padded, steps))
    return interleaved(sides, steps), sides, sides[1:] != tuple(space[1:])


class Block(nn.Module):
    """x + attention in groups, x + perceptron, on a token map (B, d, h, w, C); `interval` None attends locally."""

    def __init__(self, width: int, heads: int, group: Sizes, mlp_ratio: float, interval: int | None) -> None:
        super().__init__()
        self.group, self.interval = group, interval
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attend(self, x: Tensor) -> Tensor:
        space = x.shape[1:-1]
        if space[1] < self.group[1]:  # the published code looks at h only; it would also stay so for later inputs
            groups, sides, hide = local_groups(space, (space[0], space[1], space[2]))
        elif self.interval is None:
            groups, sides, hide = local_groups(space, self.group)
        else:
            groups, sides, hide = global_groups(space, self.group, self.interval)
        bias = None
        if hide:
            hidden = groups.split(padded_positions(space, sides, x.device)).squeeze(-1)
            bias = hidden.to(x.dtype)[:, :, None, None] * HIDDEN_KEY
        mixed = self.attn(groups.split(pad_ends(x, sides)), bias)
        return cut_ends(groups.join(mixed), space)


class PositionConv(nn.Module):
    """x + a depthwise 3 x 3 x 3 convolution of x: positions told by the neighbourhood."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv3d(width, width, 3, padding=1, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_last(self.proj(channels_first(x)))


class PatchMerging(nn.Module):
    """(B, d, h, w, C) -> (B, d/2, h/2, w/2, 2C): eight neighbours side by side, LayerNorm, linear without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(8 * width)

    def forward(self, x: Tensor) -> Tensor:
        merged = torch.cat([x[:, d::2, h::2, w::2] for d, h, w in CORNERS], dim=-1)
        out: Tensor = self.reduction(self.norm(merged))
        return out


class Stage(nn.Module):
    """Position convolution and blocks, local and global in turn; `down` or `up` (one of them) leads on."""

    def __init__(
        self, config: DFormerConfig, level: int, *, down: nn.Module | None = None, up: nn.Module | None = None
    ) -> None:
        super().__init__()
        width, interval = config.width * 2**level, config.intervals[level]
        self.blocks = nn.Sequential(
            *(
                Block(width, config.heads[level], config.group, config.mlp_ratio, interval if index % 2 else None)
                for index in range(config.depths[level])
            )
        )
        self.downsample = down
        self.upsample = up
        self.pos_block = PositionConv(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pos_block(x))
        for onward in (self.downsample, self.upsample):
            x = x if onward is None else onward(x)
        return x


class Backbone(nn.Module):
    """Image (B, C, z, y, x), already padded -> token maps of every decoder level, finest first."""

    def __init__(self, config: DFormerConfig) -> None:
        super().__init__()
        last = config.stages - 1
        widths = [config.width * 2**level for level in range(config.stages)]
        self.patch_embed = PatchEmbed(config.in_channels, config.width, config.patch)
        self.layers = nn.ModuleList(
            Stage(config, level, down=PatchMerging(width) if level < last else None)
            for level, width in enumerate(widths)
        )
        self.norm = nn.LayerNorm(widths[-1])
        ups = {level: PatchExpand(widths[level], widths[level - 1], (2, 2, 2)) for level in range(1, last + 1)}
        decoder = [Stage(config, level, up=ups.get(level)) for level in range(last - 1, -1, -1)]
        self.layers_up = nn.ModuleList([ups[last], *decoder])
        joins = (nn.Linear(2 * widths[level], widths[level]) for level in range(last - 1, -1, -1))
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *joins])
        self.norm_up = nn.LayerNorm(config.width)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, entered = self.patch_embed(image), []
        for stage in self.layers:
            entered.append(x)
            x = stage(x)
        decoded = [self.layers_up[0](self.norm(x))]
        for up, join, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], entered[-2::-1]):
            decoded.append(up(join(torch.cat([decoded[-1], skip], dim=-1))))
        return [self.norm_up(decoded[-1]), *decoded[-3::-1]]


class Head(nn.Sequential):
    """Token map (B, d, h, w, C) -> scores (B, K, z, y, x) at the voxels of its patches."""

    def __init__(self, width: int, patch: Sizes, classes: int) -> None:
        super().__init__(PatchExpand(width, width, patch), nn.Conv3d(width, classes, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        spread, score = self
        out: Tensor = score(channels_first(spread(x)))
        return out


class DFormer(nn.Module):
    """Volume (B, C, z, y, x) of any size -> scores (B, K, z, y, x), or a tuple of them, finest first."""

    Config = DFormerConfig

    def __init__(self, config: DFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.model_down = Backbone(config)
        levels = range(max(config.stages - 1, 1) if config.deep_supervision else 1)
        self.final = nn.ModuleList(Head(config.width * 2**level, config.patch, config.out_channels) for level in levels)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        if image.ndim != 5:
            raise ShapeError(f"D-Former wants (B, C, z, y, x), got {tuple(image.shape)}")
        maps = self.model_down(pad_image(image, self.config.multiples))
        scores = [head(map_) for head, map_ in zip(self.final, maps)]
        cropped = [crop_level(score, image, level) for level, score in enumerate(scores)]
        return tuple(cropped) if self.config.deep_supervision else cropped[0]


def crop_level(scores: Tensor, image: Tensor, level: int) -> Tensor:
    """The part of (B, K, z, y, x) that covers the image, at 1 / 2^level of its size rounded up."""
    for axis in (2, 3, 4):
        scores = scores.narrow(axis, 0, -(-image.shape[axis] // 2**level))
    return scores
