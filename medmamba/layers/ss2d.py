"""Two-dimensional selective scan: the parts that VMamba and its descendants share. Maps are channel-first.

Letters: B batch, C channels, D inner channels, H, W the map, L = H * W, K directions, R rank of delta, N state size.
Definition followed: "VMamba: Visual State Space Model" (Liu et al.), SS2D v05, and the selective scan of Mamba.
Truth for tests: ops.scan in float64 and the golden cases of the systems that use these parts.
Linear layers and norms keep the weights (out, in) and (C,) of their token form, so published weights load as they are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.ops.scan import selective_scan
from medmamba.ops.scan_directions import Direction, all_directions, selective_scan_directions

CROSS = all_directions(2)  # row-major, column-major, and the time reverse of both


class ChannelLinear(nn.Linear):
    """A linear layer over axis 1 of (B, C, *space); the weight stays (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over axis 1 of (B, C, *space), at every position alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelMlp(nn.Module):
    """fc1, exact GELU, fc2 over the channels of (B, C, *space)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ChannelLinear(channels, hidden)
        self.fc2 = ChannelLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchMerging(nn.Module):
    """(B, C, H, W) -> (B, out, ceil(H/2), ceil(W/2)): 2 x 2 neighbours side by side, LayerNorm, linear without bias."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.reduction = ChannelLinear(4 * channels, out, bias=False)
        self.norm = ChannelNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=1)))


class Stage(nn.Module):
    """Blocks one after the other, then what leads to the next stage (nothing after the last)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class ClassHead(nn.Module):
    """LayerNorm, mean over the map, linear: (B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(2).mean(dim=2))


def cross_scan(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, 4, D, L): row-major, column-major, and the time reverse of both.

    With `cross_merge` the definition of what `ScanParameters.scan_map` does in place.
    """
    forth = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
    return torch.cat([forth, forth.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, D, L) as `cross_scan` lays it -> the sum (B, D, H, W) of the four on their own pixels."""
    both = y[:, :2] + y[:, 2:].flip(-1)
    rows, columns = both[:, 0], both[:, 1]
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).transpose(2, 3)


class ScanParameters(nn.Module):
    """The learned tensors of K directional scans and the scan itself; systems add what stands around it.

    `dt_rank=None` takes ceil(channels / 16), the rule of the field, where `channels` is the width outside.
    """

    def __init__(self, *, channels: int, inner: int, directions: int, state: int, dt_rank: int | None = None) -> None:
        super().__init__()
        if min(inner, directions, state) < 1:
            raise ConfigError(f"inner={inner}, directions={directions}, state={state}: a scan wants 1 or more of each")
        rank = default_rank(channels) if dt_rank is None else dt_rank
        self.rank, self.state = rank, state
        self.x_proj_weight = nn.Parameter(torch.empty(directions, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, rank))
        self.dt_projs_bias = nn.Parameter(inverse_softplus_steps(directions * inner).view(directions, inner))
        self.A_logs = nn.Parameter(initial_A_log(directions * inner, state))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)

    def scan(self, xs: Tensor, first: int = 0) -> Tensor:
        """(B, K', D, L) -> (B, K', D, L): K' sequences scanned with the parameter sets first, ..., first + K' - 1."""
        batch, count, inner, length = xs.shape
        sets = slice(first, first + count)
        rows = slice(first * inner, (first + count) * inner)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight[sets])
        dt, B, C = projected.split([self.rank, self.state, self.state], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_projs_weight[sets])
        y: Tensor = selective_scan(  # type: ignore[assignment]
            xs.reshape(batch, count * inner, length),
            delta.reshape(batch, count * inner, length),
            -torch.exp(self.A_logs[rows]),
            B.contiguous(),
            C.contiguous(),
            D=self.Ds[rows],
            delta_bias=self.dt_projs_bias[sets].reshape(-1),
            delta_softplus=True,
        )
        return y.reshape(batch, count, inner, length)

    def scan_map(self, x: Tensor, directions: Sequence[Direction] | Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W): the map scanned in each of the K directions in place, the results summed.

        A table (K, L) of positions in visiting order serves as well as K directions.
        """
        inner = x.shape[1]
        pixels = x.movedim(1, -1)
        projected = F.linear(pixels, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (len(directions), -1))
        dt, B, C = projected.movedim(-2, 1).split([self.rank, self.state, self.state], dim=-1)
        y = selective_scan_directions(
            pixels,
            dt,
            -torch.exp(self.A_logs).view(-1, inner, self.state),
            B,
            C,
            self.Ds.view(-1, inner),
            self.dt_projs_bias,
            delta_softplus=True,
            directions=directions,
            delta_weight=self.dt_projs_weight,
        )
        assert isinstance(y, Tensor)
        return y.movedim(-1, 1)


class SS2D(ScanParameters):
    """Four-direction scan of a map (B, C, H, W): in_proj, depthwise conv, SiLU, scan and sum, norm, gate, out_proj.

    `conv=1` leaves the depthwise convolution out. `gate=False` is the released "v05_noz".
    """

    def __init__(
        self,
        channels: int,
        *,
        state: int = 1,
        ratio: float = 1.0,
        dt_rank: int | None = None,
        conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
    ) -> None:
        inner = int(ratio * channels)
        super().__init__(channels=channels, inner=inner, directions=4, state=state, dt_rank=dt_rank)
        self.gate = gate
        self.out_norm = ChannelNorm(inner)
        self.in_proj = ChannelLinear(channels, 2 * inner if gate else inner, bias=False)
        if conv > 1:
            self.conv2d: nn.Module = depthwise(inner, conv, bias=conv_bias)
        else:
            self.conv2d = nn.Identity()
        self.out_proj = ChannelLinear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=1)
        x = F.silu(self.conv2d(x))
        y = self.out_norm(self.scan_map(x, CROSS))
        return self.out_proj(y if z is None else y * F.silu(z))


def depthwise(channels: int, size: int, *, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    """A size x size convolution of each channel alone, padded by (size - 1) // 2."""
    return nn.Conv2d(channels, channels, size, stride, (size - 1) // 2, groups=channels, bias=bias)


def default_rank(channels: int) -> int:
    """ceil(channels / 16)."""
    return math.ceil(channels / 16)


def initial_A_log(rows: int, state: int) -> Tensor:
    """(rows, N): log(n + 1), so that A = -1, -2, ..., -N (S4D-real)."""
    return torch.arange(1, state + 1, dtype=torch.float32).log().repeat(rows, 1)


def initial_weights(module: nn.Module) -> None:
    """For `nn.Module.apply`: linear weights truncated normal 0.02, linear biases 0 (norms are born as 1 and 0)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
