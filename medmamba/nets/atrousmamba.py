"""AtrousMamba: AWMambaBCD and AWMambaSCD, change networks whose scans run over windows with holes.

Letters: B batch, C channels of one date, D inner channels, H, W the map, L = H * W, R rates.
Definition followed: Wang et al., "AtrousMamaba: An Atrous-Window Scanning Visual State Space Model for Remote Sensing
Change Detection" (2025). There is no public code. Taken from the paper's abstract: an atrous-window selective scan
whose range grows with adjustable rates and brings near tokens closer in the sequence, the AWVSS block around it, and
end-to-end networks for binary and for semantic change. Taken from a second-hand summary: four groups of dilated windows
scanned by four selective scans in parallel in place of the four directions, rates 2, 5, 7, 9, then a squeeze and
excitation of the channels.
Inferred here: a window holds `side` x `side` tokens that lie `rate` pixels apart, the tokens between them follow in
turn, windows one after the other; every second rate is read backwards, so that a token has both sides before it; the
block around the scan is VMamba's; the decoders are ChangeMamba's. The semantic decoders have AWVSS blocks; the change
decoder keeps the cross scan, because an even rate would never bring the two dates of the woven map together.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.change_pair import CHANGE
from medmamba.layers.squeeze import SqueezeExcite
from medmamba.layers.ss2d import ChannelLinear, ChannelNorm, ScanParameters, depthwise
from medmamba.nets.changemamba import MambaBCD, MambaBCDConfig, MambaSCD
from medmamba.nets.vmamba import VSSBlock
from medmamba.routes import route


@dataclass(frozen=True, slots=True, kw_only=True)
class AWMambaBCDConfig(MambaBCDConfig):
    """Defaults: the tiny encoder. `rates` one scan each; `side` tokens a side of a window. No gate in its scans."""

    rates: tuple[int, ...] = (2, 5, 7, 9)
    side: int = 4

    def __post_init__(self) -> None:
        MambaBCDConfig.__post_init__(self)
        if not self.rates or min(*self.rates, self.side) < 1:
            raise ConfigError(f"rates {self.rates}, side {self.side}: one rate or more, each number 1 or more")
        if self.gate:
            raise ConfigError("gate=True: the atrous-window scan has no gate")

    def encoder_block(self, width: int) -> nn.Module:
        return awvss_block(self, width, drop_path=0.0)

    def semantic_block(self, width: int) -> nn.Module:
        return awvss_block(self, width, drop_path=self.drop_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AWMambaSCDConfig(AWMambaBCDConfig):
    """Defaults: the tiny encoder and SECOND's seven classes; `out_channels` is 2 + 2K."""

    out_channels: int = CHANGE + 2 * 7


@lru_cache(maxsize=64)
def atrous_orders(shape: tuple[int, int], rates: tuple[int, ...], side: int) -> Tensor:
    """The order (R, L) in which each rate visits a map; every second one from its end. int32."""
    orders = [route("atrous_window", shape, size=side * rate, rate=rate) for rate in rates]
    return torch.stack([order.flip(0) if number % 2 else order for number, order in enumerate(orders)]).int()


class AtrousWindowScan(ScanParameters):
    """A map (B, C, H, W) scanned once with each rate, the results summed and their channels weighed. Same shape."""

    def __init__(
        self,
        channels: int,
        *,
        rates: tuple[int, ...],
        side: int,
        state: int,
        ratio: float,
        dt_rank: int | None,
        conv: int,
        conv_bias: bool,
    ) -> None:
        inner = int(ratio * channels)
        super().__init__(channels=channels, inner=inner, directions=len(rates), state=state, dt_rank=dt_rank)
        self.rates, self.side = rates, side
        self.in_proj = ChannelLinear(channels, inner, bias=False)
        self.conv2d = depthwise(inner, conv, bias=conv_bias) if conv > 1 else nn.Identity()
        self.out_norm = ChannelNorm(inner)
        self.se = SqueezeExcite(inner)
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        orders = atrous_orders((x.shape[2], x.shape[3]), self.rates, self.side)
        y = self.scan_map(F.silu(self.conv2d(self.in_proj(x))), orders)
        return self.out_proj(self.se(self.out_norm(y)))


def awvss_block(config: AWMambaBCDConfig, width: int, *, drop_path: float) -> VSSBlock:
    """VMamba's block around the atrous-window scan."""
    op = AtrousWindowScan(
        width,
        rates=config.rates,
        side=config.side,
        state=config.state,
        ratio=config.ratio,
        dt_rank=config.dt_rank,
        conv=config.conv,
        conv_bias=config.conv_bias,
    )
    return VSSBlock(width, op, mlp_ratio=config.mlp_ratio, drop_path=drop_path)


class AWMambaBCD(MambaBCD):
    """Pair (B, 2C, H, W), the earlier date first -> scores of unchanged and changed (B, 2, H, W), any H and W."""

    Config = AWMambaBCDConfig


class AWMambaSCD(MambaSCD):
    """Pair (B, 2C, H, W) -> (B, 2 + 2K, H, W), read with `layers.change_pair.split_scores`; any H and W."""

    Config = AWMambaSCDConfig
