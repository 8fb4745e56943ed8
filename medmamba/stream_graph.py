"""Networks of known layers as passes, however they are wired: their graph is cut where a map must stand whole.

A map that others need the sum of (before a norm over the image, before a mean of it) is written to scratch by a pass
that carries mean and squared deviation of each channel from row to row; the norm itself is taken wherever the map is
read again. A map is also kept where several want it, or where the halo of what leads to it would grow beyond HALO rows.
Between two kept maps a slab goes through all layers at once, each shown as many rows as the next one wants.
Letters: B = 1 batch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from medmamba.layers.nd import channels_first, channels_last
from medmamba.layers.need import Need
from medmamba.stream_pass import Pass, Place, Rows, Stream
from medmamba.stream_trace import Graph, Shapes, rates, shapes_of, traced

HALO = 8  # rows of the finest map at most, before a map on the way is kept


@torch.no_grad()
def by_graph(network: nn.Module, image: Stream, name: str) -> list[Pass]:
    """One pass a kept map, the scores last. Raises ConfigError naming a part that cannot stream."""
    graph = traced(network)
    shapes = shapes_of(graph, image)
    maps, passes = {graph.image: image}, dict[fx.Node, Pass]()
    for number, node in enumerate(_kept(graph, shapes)):
        made = Stream(name=f"{name}{number}.{node.name}", space=shapes[node.name][2:], channels=shapes[node.name][1])
        passes[node] = _Cut(graph, shapes, maps, made, node).made(passes)
        maps[node] = made
    return list(passes.values())


def _kept(graph: Graph, shapes: Shapes) -> list[fx.Node]:
    """The nodes whose maps are written, in order: see the top of this file."""
    rows = shapes[graph.image.name][2]
    kept = {graph.rowed(node)[0]: None for node, need in graph.needs.items() if need.statistics} | {graph.last: None}
    depth = {graph.image: 0}  # rows of the image that a row looks beyond its own, since a kept map
    nodes = [node for node in graph.graph.nodes if node in graph.needs and node not in graph.constant]
    for node in nodes:
        inputs, halo = graph.rowed(node), graph.needs[node].halo
        halo = halo * rows // shapes[inputs[0].name][2]
        depth[node] = halo + max(0 if n in kept else depth[n] for n in inputs)
        if halo and depth[node] > HALO:
            kept.update({n: None for n in inputs if depth[n]})
            depth[node] = halo
        if depth[node] and len(node.users) > 1:
            kept[node] = None
    return [node for node in nodes if node in kept]


class _Cut:
    """The part of a graph that one pass works: from kept maps to the next one."""

    def __init__(self, graph: Graph, shapes: Shapes, maps: dict[fx.Node, Stream], made: Stream, node: fx.Node) -> None:
        self.graph, self.shapes, self.maps, self.stream, self.node = graph, shapes, dict(maps), made, node
        self.summed: dict[fx.Node, None] = {}  # maps whose sums are asked for
        self.wanted: dict[fx.Node, Rows] = {}  # rows of maps, for the second row of the coarsest on the way
        self.passed = {made.space[0]}  # rows of all maps on the way
        self._look(node, (1, 2))
        self.wanted.clear()
        self.coarsest = math.gcd(*self.passed)
        step = made.space[0] // self.coarsest
        self._look(node, (step, 2 * step))
        self.sources = sorted(self.wanted, key=lambda n: -maps[n].space[0])
        self.carries = any(need.statistics and node in graph.rowed(n) for n, need in graph.needs.items())

    def _look(self, node: fx.Node, rows: Rows) -> None:
        """Notes which rows of which maps, and whose sums, `rows` of a node are made of."""
        if node not in self.graph.constant:
            self.passed.add(self.shapes[node.name][2])
        if node in self.maps:
            low, high = self.wanted.get(node, rows)
            self.wanted[node] = min(low, rows[0]), max(high, rows[1])
            return
        maps = self.graph.rowed(node)
        if node in self.graph.needs and self.graph.needs[node].statistics:
            self.summed[maps[0]] = None
        for source in node.all_input_nodes:
            if source not in maps:
                self._look(source, rows)
            elif node not in self.graph.constant:
                self._look(source, self.graph.reach(node, rows))

    def made(self, passes: dict[fx.Node, Pass]) -> Pass:
        reads = [self.maps[n] for n in self.sources]
        units = [stream.space[0] // self.coarsest for stream in reads]
        halos = [
            max(u - low, high - 2 * u) for u, (low, high) in zip(units, map(self.wanted.__getitem__, self.sources))
        ]
        return Pass(
            name=self.stream.name,
            reads=tuple(reads),
            writes=(self.stream,),
            work=self.work,
            need=Need(halo=halos[0], unit=units[0]),
            halos=tuple(halos[1:]),
            state=(3, self.stream.channels) if self.carries else (),
            state_dtype=torch.float64 if self.carries else None,
            sums=tuple(passes[n] for n in self.summed),
        )

    def work(self, parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], Tensor | None]:
        finest = self.maps[self.sources[0]].space[0]
        low, high = ((at.starts[0] + n) * self.stream.space[0] // finest for n in (at.rows.start, at.rows.stop))
        maps = map(channels_first, parts)
        seen = {n: (part, start) for n, part, start in zip(self.sources, maps, at.starts, strict=True)}
        values = _Values(self.graph, self.shapes, seen, dict(zip(self.summed, at.sums, strict=True)))
        made = channels_last(values.of(self.node, (low, high))).contiguous()
        return [made], moments(made, at.carried) if self.carries else None


class _Values:
    """What a slab shows: rows of maps that were read, each with its first row, and the moments of whole maps."""

    def __init__(
        self,
        graph: Graph,
        shapes: Shapes,
        seen: dict[fx.Node, tuple[Tensor, int]],
        sums: dict[fx.Node, Tensor],
    ) -> None:
        self.graph, self.shapes, self.seen, self.sums = graph, shapes, seen, sums

    def of(self, node: fx.Node, rows: Rows) -> Tensor:
        """Rows (B, C, rows, ...) of a map."""
        if node in self.seen:
            part, start = self.seen[node]
            return part[:, :, rows[0] - start : rows[1] - start]
        need, source = self.graph.needs[node], self.graph.rowed(node)[0]
        if need.statistics:
            return normalised(self.graph.layer(node), self.of(source, rows), self.sums[source])
        low, high = self.graph.reach(node, rows)
        low, high = max(low, 0), min(high, self.shapes[source.name][2])
        ((down, up),) = rates(need, 1)
        first = low // down * up
        return self._call(node, (low, high))[:, :, rows[0] - first : rows[1] - first]

    def constant(self, node: fx.Node) -> Any:
        """A value that is the same for every row."""
        if node.op == "get_attr":
            return fx.graph_module._get_attr(self.graph.network, str(node.target))
        if self.graph.pools(node):
            mean = self.sums[self.graph.rowed(node)[0]][1]
            return mean.to(next(iter(self.seen.values()))[0]).reshape(self.shapes[node.name])
        return self._call(node, (0, 0))

    def _call(self, node: fx.Node, rows: Rows) -> Any:
        """The node's own function, shown `rows` of its maps."""

        def shown(n: fx.Node) -> Any:
            return self.constant(n) if n in self.graph.constant else self.of(n, rows)

        args: Any = fx.node.map_arg(node.args, shown)
        kwargs: Any = fx.node.map_arg(node.kwargs, shown)
        if node.op == "call_module":
            layer = self.graph.layer(node)
            first, *others = args
            return layer(first.clone() if getattr(layer, "inplace", False) else first, *others, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **{**kwargs, **({"inplace": False} if "inplace" in kwargs else {})})  # type: ignore


def moments(rows: Tensor, carried: Tensor | None) -> Tensor:
    """Count, mean and summed squared deviation of each channel (3, C), float64, over `rows` (1, rows, ..., C) and those
    that `carried` tells of; row by row, so that slabs of any size give the same bits (Chan et al., 1979)."""
    count, mean, squares = carried.double() if carried is not None else rows.new_zeros(3, rows.shape[-1]).double()
    for row in rows[0]:
        row = row.reshape(-1, rows.shape[-1]).double()
        own, n = row.mean(0), len(row)
        apart = own - mean
        squares = squares + (row - own).square_().sum(0) + apart.square() * count * n / (count + n)
        mean = mean + apart * n / (count + n)
        count = count + n
    return torch.stack([count, mean, squares])


def normalised(norm: Any, map_: Tensor, sums: Tensor) -> Tensor:
    """Rows (B, C, rows, ...) as an instance or group norm of the whole map gives them."""
    count, mean, squares = sums
    spread = squares / count
    if isinstance(norm, nn.GroupNorm):
        groups = mean.view(norm.num_groups, -1)
        middle = groups.mean(1, keepdim=True)
        spread = (spread.view_as(groups) + (groups - middle).square()).mean(1, keepdim=True).expand_as(groups).flatten()
        mean = middle.expand_as(groups).flatten()
    return F.batch_norm(map_, mean.to(map_), spread.to(map_), norm.weight, norm.bias, False, 0.0, norm.eps)
