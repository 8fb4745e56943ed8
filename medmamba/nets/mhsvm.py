"""MHS-VM: a U-shaped network whose scans run in parallel channel subspaces along pairs of routes; segmentation.

Letters: B batch, C channels, d channels of a head, H, W the map, L = H * W, K classes.
Definition followed: "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba" and its released training
setting. Parameter names are the official ones without the tensors listed twice: see `own_name`. Truth for tests:
golden cases `mhsvm`. Inputs whose sides are no multiple of the deepest stride are padded with their border and cropped.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.ss2d import (
    ChannelLinear,
    ChannelNorm,
    PatchMerging,
    ScanParameters,
    Stage,
    depthwise,
    initial_weights,
)
from medmamba.routes import inverse, route

REPEATED = ("x_ssproj_W", "scanning.seq2seq_engine.")  # second names of tied tensors in published files
HEADS = "CXSZ"  # continuous, diagonal, spiral, raster: in the order in which heads are added


@dataclass(frozen=True, slots=True, kw_only=True)
class MHSVMConfig:
    """Defaults: the released training setting. `heads` 3 or 4; `threshold` is the fusion's gfu_t."""

    spatial_dims: ClassVar[int] = 2
    in_channels: int = 3
    out_channels: int = 1
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    depths_decoder: tuple[int, ...] = (2, 2, 2, 1)
    patch: int = 4
    state: int = 16
    heads: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.depths_decoder):
            raise ConfigError(f"widths {self.widths}, depths {self.depths}, {self.depths_decoder}: one of each a stage")
        if self.heads not in (3, 4):
            raise ConfigError(f"heads={self.heads}: 3 (C, X, S) or 4 (C, X, S, Z)")
        if any(wide != 2 * narrow for narrow, wide in pairwise(self.widths)):
            raise ConfigError(f"widths {self.widths}: each must be twice the one before")

    @property
    def stride(self) -> int:
        """Pixels of one position of the deepest map."""
        return self.patch * 2 ** (len(self.widths) - 1)


@lru_cache(maxsize=32)
def route_pair(pattern: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The two orders (L,) of a head: C snakes by rows and columns, X diagonals, S spirals, Z raster."""
    shape = (height, width)
    if pattern == "C":
        return route("snake", shape), route("snake", shape, axes=(1, 0))
    if pattern == "Z":
        return route("raster", shape), route("column", shape)
    if pattern == "X":
        first = route("diagonal", shape)
        return first, first // width * width + (width - 1 - first % width)  # columns mirrored
    if pattern == "S":
        first = route("spiral", shape)
        return first, (height - 1 - first // width) * width + first % width  # rows mirrored
    raise ConfigError(f"pattern {pattern!r} unknown; known: {', '.join(HEADS)}")


class ScanHead(nn.Module):
    """A map (B, d, H, W) scanned along a pair of routes, both ways, the four results fused: (B, d, H, W)."""

    def __init__(self, channels: int, pattern: str, *, state: int, threshold: float) -> None:
        super().__init__()
        self.pattern, self.threshold = pattern, threshold
        self.mambaeng = ScanParameters(channels=channels, inner=channels, directions=4, state=state)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (order.to(x.device) for order in route_pair(self.pattern, *x.shape[2:]))
        flat = x.flatten(2)
        orders = (first, first.flip(0), second, second.flip(0))
        results = self.mambaeng.scan(torch.stack([flat[..., order] for order in orders], dim=1))
        maps = [result[..., inverse(order)] for result, order in zip(results.unbind(1), orders, strict=True)]
        return fuse_routes(torch.stack(maps, dim=1), self.threshold).unflatten(-1, x.shape[2:])


def fuse_routes(values: Tensor, threshold: float) -> Tensor:
    """Sum over the four routes (B, 4, d, L) times how far their coefficient of variation exceeds the threshold.

    Where the routes nearly agree the coefficient is ill-conditioned: float32 then holds about four digits, and 16 bits
    hold none (a network of random weights under bfloat16 autocast is off by as much as its largest logit).
    """
    spread = values.std(dim=1)
    mean = (values - values.amin(dim=1, keepdim=True)).mean(dim=1)
    return values.sum(dim=1) * F.relu(spread / (mean + 1e-5) - threshold)


class MultiHeadScan(nn.Module):
    """Channels (B, C, H, W) projected into one subspace a head, scanned, normalised and projected back."""

    def __init__(self, channels: int, *, heads: int, state: int, threshold: float) -> None:
        super().__init__()
        part = channels // heads
        if part < 1:
            raise ConfigError(f"{channels} channels are too few for {heads} heads")
        self.patterns = HEADS[:heads]
        self.x_ssproj = ChannelLinear(channels, heads * part, bias=False)
        for pattern in self.patterns:
            self.add_module(f"scanhead_{pattern}", ScanHead(part, pattern, state=state, threshold=threshold))
        self.cat_norm = ChannelNorm(heads * part)
        self.y_proj = ChannelLinear(heads * part, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.x_ssproj(x).chunk(len(self.patterns), dim=1)
        heads = [self.get_submodule(f"scanhead_{name}")(part) for name, part in zip(self.patterns, parts, strict=True)]
        return self.y_proj(self.cat_norm(torch.cat(heads, dim=1)))


class GatedScan(nn.Module):
    """Depthwise convolution, multi-head scan and norm, gated; no expansion, no projection behind the gate."""

    def __init__(self, channels: int, *, heads: int, state: int, threshold: float) -> None:
        super().__init__()
        self.in_proj = ChannelLinear(channels, 2 * channels, bias=False)
        self.conv2d = depthwise(channels, 3)
        self.mhs = MultiHeadScan(channels, heads=heads, state=state, threshold=threshold)
        self.out_norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=1)
        return self.out_norm(self.mhs(F.silu(self.conv2d(x)))) * F.silu(z)


class MHSBlock(nn.Module):
    """x + gated scan of norm(x). Maps (B, C, H, W). The published block alone has `eps=1e-6`, inside the net 1e-5."""

    def __init__(self, channels: int, *, heads: int, state: int, threshold: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.ln_1 = ChannelNorm(channels, eps=eps)
        self.self_attention = GatedScan(channels, heads=heads, state=state, threshold=threshold)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attention(self.ln_1(x))


class PatchEmbedding(nn.Module):
    """Image -> (B, C0, H/patch, W/patch), normalised."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PatchExpand(nn.Module):
    """(B, C, H, W) -> (B, out, H*factor, W*factor): a linear layer whose channels become pixels, then a norm."""

    def __init__(self, channels: int, out: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = ChannelLinear(channels, out * factor**2, bias=False)
        self.norm = ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.expand(x).unflatten(1, (self.factor, self.factor, -1))  # (B, p1, p2, c, H, W)
        return self.norm(pixels.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3))


class UpStage(nn.Module):
    """Expansion (none in the deepest stage), then the blocks."""

    def __init__(self, blocks: list[MHSBlock], upsample: nn.Module | None) -> None:
        super().__init__()
        self.upsample = nn.Identity() if upsample is None else upsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.upsample(x))


class MHSVM(nn.Module):
    """Image (B, C, H, W) -> logits (B, K, H, W), any H and W. One channel is repeated where the network wants more."""

    Config = MHSVMConfig

    def __init__(self, config: MHSVMConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.patch_embed = PatchEmbedding(config.in_channels, widths[0], config.patch)
        merging = [*(PatchMerging(a, b) for a, b in pairwise(widths)), None]
        self.layers = nn.ModuleList(
            Stage(blocks(config, width, depth), after)
            for width, depth, after in zip(widths, config.depths, merging, strict=True)
        )
        self.layers_up = nn.ModuleList(
            UpStage(blocks(config, width, depth), PatchExpand(2 * width, width, 2) if level else None)
            for level, (width, depth) in enumerate(zip(reversed(widths), config.depths_decoder, strict=True))
        )
        self.final_up = PatchExpand(widths[0], widths[0] // 4, config.patch)
        self.final_conv = nn.Conv2d(widths[0] // 4, config.out_channels, 1)
        self.apply(initial_weights)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if x.shape[1] == 1:
            x = x.expand(-1, self.config.in_channels, -1, -1)
        stride = self.config.stride
        x = self.patch_embed(F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate"))
        entries = []
        for layer in self.layers:
            entries.append(x)
            x = layer(x)
        for level, layer in enumerate(self.layers_up):
            x = layer(x + entries[-level] if level else x)  # the entry of a stage joins before the expansion
        return self.final_conv(self.final_up(x))[:, :, :height, :width]

    @staticmethod
    def own_name(official: str) -> str | None:
        """Our name of a published tensor: without the wrapper's prefix; None for the second name of a tied one."""
        return None if any(part in official for part in REPEATED) else official.removeprefix("vmunet.")


def blocks(config: MHSVMConfig, width: int, depth: int) -> list[MHSBlock]:
    """`depth` blocks of the given width."""
    settings = {"heads": config.heads, "state": config.state}
    return [MHSBlock(width, threshold=config.threshold, **settings) for _ in range(depth)]
