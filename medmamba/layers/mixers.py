"""Sequence mixers over maps of any rank: (B, *space, D) -> (B, *space, D), by name in `MIXERS`.

Letters: B batch, D channels, L positions, N states (width of keys for gla), H heads of width P, R rank of the step,
Z planes along the first axis. Each is one projection and one op of medmamba.ops: no convolution, no gate, no norm, as a
coupling branch has its own. Both directions of a route are summed (vssd has none). Always float32 (float64 stays).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.mamba import inverse_softplus_steps
from medmamba.layers.need import Need
from medmamba.ops.gla import gla_bounded
from medmamba.ops.scan_directions import selective_scan_directions
from medmamba.ops.sweep import sweep
from medmamba.routes import STREAMABLE, inverse, route

HEAD = 16  # widest head of ssd, gla and hydra
GATE_DIVISOR = 16.0  # log gates of gla are logsigmoid / 16, as in ViG
GATE_FLOOR = -1.0  # lowest log gate, reached below a raw gate of -16: 32 in a row stay in the bound of the op


class Mixer(nn.Module):
    """`width` D channels, `state` N, the name of a `route`."""

    def __init__(self, width: int, *, state: int, route: str) -> None:
        super().__init__()
        self.width, self.state, self.route = width, state, route
        self.head = math.gcd(width, HEAD)
        self.heads = width // self.head

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
            return self.mix(x.to(next(self.parameters()).dtype)).to(x.dtype)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def need(self) -> Need | None:
        """What a slab of planes wants from the others; None: this mixer cannot be streamed. Those that can have
        `gather` (a sweep from the last plane to the first) and `stream` (from the first to the last)."""
        return None

    def gather(self, x: Tensor, behind: Tensor | None) -> Tensor:
        """What the planes of x, in front of those that left `behind`, leave to the planes in front of them."""
        raise NotImplementedError

    def stream(
        self, x: Tensor, ahead: Tensor | None, behind: Tensor | None, whole: Tensor, cells: int
    ) -> tuple[Tensor, Tensor | None]:
        """The result on planes x of a map of `cells` positions, and the state it leaves to the planes behind: `ahead`
        and `behind` are the states left by the planes on either side, `whole` is what `gather` left in the end."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """(B, *space, D) -> (B, L, D) in the order of the route."""
        flat = x.flatten(1, -2)
        if self.route == "raster":
            return flat
        return flat.index_select(1, both_ways(self.route, x.shape[1:-1])[0][0].to(x.device))

    def map(self, tokens: Tensor, space: torch.Size) -> Tensor:
        """The inverse of `tokens`."""
        if self.route != "raster":
            tokens = tokens.index_select(1, both_ways(self.route, space)[1].to(tokens.device))
        return tokens.unflatten(1, space)


class S6(Mixer):
    """Selective scan forth and back along the route; every tensor stays where it lies in the map."""

    def __init__(self, width: int, *, state: int, route: str) -> None:
        super().__init__(width, state=state, route=route)
        self.rank = math.ceil(width / 16)
        self.project = nn.Linear(width, 2 * (self.rank + 2 * state), bias=False)
        self.step = nn.Parameter(torch.empty(2, width, self.rank).uniform_(-(self.rank**-0.5), self.rank**-0.5))
        self.step_bias = nn.Parameter(inverse_softplus_steps(2 * width).view(2, width))
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(2, width, 1))

    def mix(self, x: Tensor) -> Tensor:
        return self.scan(x, slice(0, 2), None)[0]

    @property
    def need(self) -> Need | None:
        return Need(state=True, unit=2 if self.route == "snake" else 1) if self.route in STREAMABLE else None

    def gather(self, x: Tensor, behind: Tensor | None) -> Tensor:
        return self.scan(x, slice(1, 2), behind)[1]

    def stream(
        self, x: Tensor, ahead: Tensor | None, behind: Tensor | None, whole: Tensor, cells: int
    ) -> tuple[Tensor, Tensor | None]:
        start = torch.cat([torch.zeros_like(whole) if state is None else state for state in (ahead, behind)], dim=1)
        y, last = self.scan(x, slice(0, 2), start)
        return y, last[:, :1]

    def scan(self, x: Tensor, ways: slice, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chosen ones of (forth, back), summed, and their last states (B, ways, D, N)."""
        low, B, C = (t[:, ways] for t in self.projected(x))
        A, weight, bias = (t[ways] for t in self.dynamics())
        out = selective_scan_directions(
            x,
            low,
            A,
            B,
            C,
            delta_bias=bias,
            delta_softplus=True,
            directions=self.directions(x.shape[1:-1])[ways],
            delta_weight=weight,
            initial_state=start,
            return_last_state=True,
        )
        assert isinstance(out, tuple)
        return out

    def directions(self, space: torch.Size) -> tuple[tuple[int, int], ...] | Tensor:
        """Forth and back, as the op takes them."""
        return ((-1, 1), (-1, -1)) if self.route == "raster" else both_ways(self.route, space)[0]

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the map says to the scan: raw steps (B, 2, *space, R), B and C (B, 2, *space, N)."""
        both = self.project(x).unflatten(-1, (2, -1)).movedim(-2, 1)
        return both.split([self.rank, self.state, self.state], dim=-1)

    def dynamics(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (2, D, N), the weight (2, D, R) and the bias (2, D) that make steps of D channels from the raw ones."""
        return -self.A_log.exp(), self.step, self.step_bias


class SSD(S6):
    """Mamba-2's recurrence (one decay and one step a head) by the same scan, forth and back along the route.

    The definition is ops.ssd.ssd_sequential. The scan keeps a few maps, the matmul form ten times as many.
    """

    spread: Tensor

    def __init__(self, width: int, *, state: int, route: str) -> None:
        Mixer.__init__(self, width, state=state, route=route)
        self.rank = self.heads
        self.project = nn.Linear(width, 2 * (self.heads + 2 * state), bias=False)
        self.step_bias = nn.Parameter(inverse_softplus_steps(2 * self.heads).view(2, self.heads))
        self.A_log = nn.Parameter(torch.empty(2, self.heads).uniform_(1, 16).log())
        self.register_buffer("spread", heads_to_channels(self.heads, self.head), persistent=False)  # (D, H)

    def dynamics(self) -> tuple[Tensor, Tensor, Tensor]:
        A, bias = (t @ self.spread.T for t in (-self.A_log.exp(), self.step_bias))  # (2, D)
        return A.unsqueeze(-1).expand(-1, -1, self.state), self.spread.expand(2, -1, -1), bias


class VSSD(Mixer):
    """One state for the whole map, read by every position: the mean over L of weight[l] x[l] outer B[l].

    The op is ops.ssd.ssd_noncausal with its sum taken plane by plane along the first axis, from the last to the first:
    the same bits whether the map comes whole or in slabs.
    """

    def __init__(self, width: int, *, state: int, route: str) -> None:
        super().__init__(width, state=state, route=route)
        self.project = nn.Linear(width, self.heads + 2 * state, bias=False)
        self.step_bias = nn.Parameter(inverse_softplus_steps(self.heads))

    def mix(self, x: Tensor) -> Tensor:
        return self.stream(x, None, None, self.gather(x, None), math.prod(x.shape[1:-1]))[0]

    @property
    def need(self) -> Need | None:
        return Need(statistics=True)

    def gather(self, x: Tensor, behind: Tensor | None) -> Tensor:
        weight, B, _ = self.projected(x)
        planes = self.plane_states(x, weight, B).unbind(1)[::-1]
        return functools.reduce(torch.add, planes if behind is None else (behind, *planes))

    def stream(
        self, x: Tensor, ahead: Tensor | None, behind: Tensor | None, whole: Tensor, cells: int
    ) -> tuple[Tensor, Tensor | None]:
        return self.read(self.projected(x)[2], whole / cells).view(x.shape), None

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Weights (B, *space, H), B and C (B, *space, N)."""
        raw, B, C = self.project(x).split([self.heads, self.state, self.state], dim=-1)
        return F.softplus(raw + self.step_bias), B, C

    def plane_states(self, x: Tensor, weight: Tensor, B: Tensor) -> Tensor:
        """The state of every plane alone, (B, Z, D, N)."""
        drive = (x.unflatten(-1, (self.heads, self.head)) * weight[..., None]).flatten(-2)
        return drive.flatten(2, -2).mT @ B.flatten(2, -2)

    def read(self, C: Tensor, state: Tensor) -> Tensor:
        """Every position of C (B, Z, ..., N) reads the state (B, D, N): (B, Z, L / Z, D)."""
        return C.flatten(2, -2) @ state.mT.unsqueeze(1)


class GLA(Mixer):
    """Gated linear attention, both directions along the route averaged; keys of width N a head."""

    def __init__(self, width: int, *, state: int, route: str) -> None:
        super().__init__(width, state=state, route=route)
        self.project = nn.Linear(width, 4 * self.heads * state)

    def mix(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        y = self.scan(tokens, 0) + self.scan(tokens.flip(1), 1).flip(1)
        return self.map(y / 2, x.shape[1:-1])

    def scan(self, tokens: Tensor, way: int) -> Tensor:
        """One direction, (B, L, D), by the gates of `way`. Keys and gates are made again in the backward pass, piece by
        piece: for all of L they are the largest thing a network with this mixer would keep."""
        rows = torch.tensor([0, 1, 2 + way], device=tokens.device)  # q, k and the gate of this way, of each head
        weight, bias = (
            t.unflatten(0, (self.heads, 4, -1)).index_select(1, rows).flatten(0, 2)
            for t in (self.project.weight, self.project.bias)
        )
        start = tokens.new_zeros(len(tokens), self.heads, self.state, self.head)
        return sweep(self.cell, tokens, start, weight, bias)

    def cell(self, tokens: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, l, D) and the state (B, H, N, P) before them -> what they read (B, l, D), the next state."""
        projected = F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, gate = projected.chunk(3, dim=-1)  # (B, H, l, N) each
        values = tokens.unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        gate = (F.logsigmoid(gate) / GATE_DIVISOR).clamp(min=GATE_FLOOR)
        y, state = gla_bounded(q * self.state**-0.5, k, values, gate, state)
        return y.transpose(1, 2).flatten(2), state


class Hydra(Mixer):
    """Quasiseparable mixer: strictly before, strictly after, and a diagonal of its own, along the route.

    The definition is ops.ssd.quasiseparable_sequential: two scans, each read one position later.
    """

    spread: Tensor

    def __init__(self, width: int, *, state: int, route: str) -> None:
        super().__init__(width, state=state, route=route)
        self.project = nn.Linear(width, 3 * self.heads + 4 * state, bias=False)
        self.step_bias = nn.Parameter(inverse_softplus_steps(2 * self.heads).view(2, self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.register_buffer("spread", heads_to_channels(self.heads, self.head), persistent=False)  # (D, H)

    def mix(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        diagonal, *rest = self.project(tokens).split([self.heads] * 3 + [self.state] * 4, dim=-1)
        ahead, back = (self.scan(tokens, way, *rest[way::2]) for way in (0, 1))
        y = F.pad(ahead, (0, 0, 1, 0))[:, :-1] + F.pad(back, (0, 0, 0, 1))[:, 1:]
        own = diagonal.unsqueeze(-1) * tokens.unflatten(-1, (self.heads, self.head))
        return self.map(y + own.flatten(2), x.shape[1:-1])

    def scan(self, tokens: Tensor, way: int, raw: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """One direction, (B, L, D): from the first token on (0) or from the last (1)."""
        A = (self.spread @ -self.A_log.exp())[None, :, None].expand(1, -1, self.state)
        y = selective_scan_directions(
            tokens,
            raw.unsqueeze(1),
            A,
            B.unsqueeze(1),
            C.unsqueeze(1),
            delta_bias=(self.spread @ self.step_bias[way]).unsqueeze(0),
            delta_softplus=True,
            directions=((-1, -1 if way else 1),),
            delta_weight=self.spread.unsqueeze(0),
        )
        assert isinstance(y, Tensor)
        return y


def heads_to_channels(heads: int, width: int) -> Tensor:
    """Zeros and ones (D, H): what gives every channel of a head the head's number."""
    return torch.eye(heads).repeat_interleave(width, dim=0)


@functools.lru_cache(maxsize=8)
def both_ways(name: str, space: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The order of a route and its reverse (2, L) int32, and the inverse order (L,)."""
    with torch.inference_mode(False):  # a table kept from inference must serve training too
        order = route(name, space)
        return torch.stack([order, order.flip(0)]).to(torch.int32), inverse(order)


MIXERS: dict[str, type[Mixer]] = {"s6": S6, "ssd": SSD, "vssd": VSSD, "gla": GLA, "hydra": Hydra}
