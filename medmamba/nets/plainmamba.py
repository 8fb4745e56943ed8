"""PlainMamba layer: four continuous (snake) scans that know the direction of each step. Maps (B, C, H, W).

Letters: B batch, C channels, E inner channels, H, W the map, L = H * W, N states, R rank of delta.
Definition followed: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition" and the released models, which
keep delta, B and C in raster order while the input follows the snake, and add the bias of delta twice; both are kept
here, as the published weights were trained so. Parameter names are the official ones. Truth for tests: golden cases
`plainmamba`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.ss2d import ChannelLinear, ChannelNorm, default_rank, depthwise, initial_A_log
from medmamba.ops.scan import selective_scan
from medmamba.routes import inverse, route

START, RIGHT, LEFT, UP, DOWN = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainMambaConfig:
    """One layer. `layer_scale` None leaves gamma out; `conv_after` adds the depthwise convolution behind the mixer."""

    channels: int = 192
    state: int = 16
    expand: float = 2
    conv: int = 7
    dt_rank: int | None = None
    bias: bool = True
    conv_bias: bool = True
    layer_scale: float | None = None
    conv_after: bool = False


@lru_cache(maxsize=32)
def continuous_orders(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Orders (4, L) by rows, its time reverse, by columns, its time reverse; and the move (4, L) before each step."""
    rows, columns = route("snake", (height, width)), route("snake", (height, width), axes=(1, 0))
    orders = torch.stack([rows, rows.flip(0), columns, columns.flip(0)])
    down, right = (orders // width).diff(dim=1), (orders % width).diff(dim=1)
    moves = torch.full_like(down, START)
    for move, made in ((RIGHT, right == 1), (LEFT, right == -1), (UP, down == -1), (DOWN, down == 1)):
        moves[made] = move
    return orders, F.pad(moves, (1, 0), value=START)


class PlainMambaMixer(nn.Module):
    """The direction-aware scan of a map (B, C, H, W), gated."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        channels, inner = config.channels, int(config.expand * config.channels)
        rank = default_rank(channels) if config.dt_rank is None else config.dt_rank
        self.sizes = [rank, config.state, config.state]
        self.in_proj = ChannelLinear(channels, 2 * inner, bias=config.bias)
        self.conv2d = depthwise(inner, config.conv, bias=config.conv_bias)
        self.x_proj = ChannelLinear(inner, sum(self.sizes), bias=False)
        self.dt_proj = ChannelLinear(rank, inner)
        self.A_log = nn.Parameter(initial_A_log(inner, config.state))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, config.state), std=0.02))
        self.out_proj = ChannelLinear(inner, channels, bias=config.bias)
        self.gamma = None if config.layer_scale is None else nn.Parameter(torch.full((channels,), config.layer_scale))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias.data.copy_(inverse_softplus_steps(inner))

    def forward(self, x: Tensor) -> Tensor:
        space = x.shape[2:]
        u, z = self.in_proj(x).chunk(2, dim=1)
        u = F.silu(self.conv2d(u)).flatten(2)
        y = self._four_scans(u, *(order.to(x.device) for order in continuous_orders(*space)))
        y = self.out_proj(y.unflatten(-1, space) * F.silu(z))
        return y if self.gamma is None else y * self.gamma[:, None, None]

    def _four_scans(self, u: Tensor, orders: Tensor, moves: Tensor) -> Tensor:
        """Sum (B, E, L) of the four scans of u (B, E, L), each back in raster order."""
        dt, B, C = self.x_proj(u).split(self.sizes, dim=1)
        turns = self.direction_Bs[moves].mT  # (4, N, L)
        y = selective_scan(
            u[:, :, orders].transpose(1, 2).flatten(1, 2),
            self.dt_proj(dt).repeat(1, 4, 1),
            -torch.exp(self.A_log).repeat(4, 1),
            B[:, None] + turns,
            C[:, None].expand(-1, 4, -1, -1).contiguous(),
            D=self.D.repeat(4),
            delta_bias=self.dt_proj.bias.repeat(4),  # a second time: dt_proj has added it already
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        scans = y.unflatten(1, (4, -1)).unbind(1)
        return torch.stack([scan[..., inverse(order)] for scan, order in zip(scans, orders, strict=True)]).sum(dim=0)


class PlainMambaLayer(nn.Module):
    """x + mixer(norm(x)), then, if configured, depthwise 3 x 3, BatchNorm and GELU without a residual."""

    Config = PlainMambaConfig

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = ChannelNorm(config.channels)
        self.mamba = PlainMambaMixer(config)
        self.dw = nn.Identity()
        if config.conv_after:
            convolution = depthwise(config.channels, 3, bias=False)
            self.dw = nn.Sequential(convolution, nn.BatchNorm2d(config.channels), nn.GELU())  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.dw(x + self.mamba(self.norm(x)))
