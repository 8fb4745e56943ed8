"""A network as a graph of layers and functions, what each of them needs of the rows, and the shapes between them."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from medmamba.errors import ConfigError
from medmamba.layers.need import WIDER_NEEDS, Need
from medmamba.stream_pass import Rows, Stream

CELLWISE: frozenset[Any] = frozenset(
    (
        *(operator.pos, operator.neg, operator.add, operator.sub, operator.mul, operator.truediv),
        *(torch.add, torch.sub, torch.mul, torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.cat),
        *(F.relu, F.leaky_relu, F.silu, F.gelu, F.sigmoid, F.tanh, F.elu, F.softplus, F.hardswish),
        *("add", "sub", "mul", "relu", "sigmoid", "tanh", "float", "contiguous"),
    )
)
"""Functions and methods whose result at a cell is made of that cell alone (of torch.cat: along the channels)."""
MEANS = ("mean", torch.mean)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
Shapes = dict[str, tuple[int, ...]]


class _Tracer(fx.Tracer):
    """Looks into every module that does not say its need; knows in which one it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[str, str]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in WIDER_NEEDS or hasattr(m, "need") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append((self.path_of_module(m), type(m).__name__))
        found = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return found


class _Shaper(fx.Interpreter):
    """Notes the shape of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n.name] = tuple(value.shape) if isinstance(value, Tensor) else ()
        return value


@dataclass
class Graph:
    """A traced network: what each of its nodes needs, and which are the same for every row of the image."""

    network: nn.Module
    graph: fx.Graph
    needs: dict[fx.Node, Need] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)

    @property
    def image(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def last(self) -> Any:
        return next(node for node in self.graph.nodes if node.op == "output").args[0]

    def layer(self, node: fx.Node) -> Any:
        return self.network.get_submodule(str(node.target))

    def rowed(self, node: fx.Node) -> list[fx.Node]:
        """The maps that a node looks at."""
        return [n for n in node.all_input_nodes if n not in self.constant]

    def reach(self, node: fx.Node, rows: Rows) -> Rows:
        """The rows of its maps, not clipped, that a node looks at for `rows` of its own."""
        need = self.needs[node]
        ((down, up),) = rates(need, 1)
        return (rows[0] // up - need.halo // down) * down, -(-rows[1] // up) * down + need.halo

    def pools(self, node: fx.Node) -> bool:
        """Whether the node is the mean of a whole map."""
        return node.target in MEANS or (node.op == "call_module" and isinstance(self.layer(node), POOLS))


def rates(need: Need, rank: int) -> list[tuple[int, int]]:
    """(down, up) of the first `rank` axes."""
    downs, ups = (t * rank if len(t) == 1 else t or (1,) * rank for t in (need.down, need.up))
    return list(zip(downs, ups, strict=False))[:rank]


def refused(where: str, kind: str, why: str = "") -> ConfigError:
    return ConfigError(f"{where} ({kind}) cannot be streamed{f': {why}' if why else ''}; use windows, or another part")


def traced(network: nn.Module) -> Graph:
    """The graph of a network in evaluation mode. Raises ConfigError naming the part that cannot stream."""
    tracer, kind = _Tracer(), type(network).__name__
    try:
        graph = Graph(network, tracer.trace(network))
    except Exception as error:
        where, kind = tracer.inside[-1] if tracer.inside else ("the network", kind)
        line = str(error).partition("\n")[0]
        raise refused(where, kind, f"its way depends on the size or values of its input ({line})") from error
    images = sum(node.op == "placeholder" and bool(node.users) for node in graph.graph.nodes)
    if not isinstance(graph.last, fx.Node) or graph.last is graph.image or images != 1:
        raise refused("the network", kind, "it takes or gives another number of maps than one")
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "output"):
            _declare(graph, node)
    _copy_summed_image(graph)
    return graph


def _declare(graph: Graph, node: fx.Node) -> None:
    """Notes the need of a node. Raises ConfigError when it has none."""
    inputs = graph.rowed(node)
    if not inputs:
        graph.constant.add(node)
        return
    stack = node.meta.get("nn_module_stack") or {"": ("the network", type(graph.network))}
    where, kind = list(stack.values())[-1]
    kind = getattr(kind, "__name__", str(kind))
    changes = bool(node.kwargs.get("inplace"))
    if node.op == "call_module":
        layer = graph.layer(node)
        need = WIDER_NEEDS.get(type(layer), lambda own: getattr(own, "need", None))(layer)
        where, kind, changes = str(node.target), type(layer).__name__, getattr(layer, "inplace", False)
    else:
        need = Need() if node.target in CELLWISE else Need(statistics=True) if node.target in MEANS else None
        kind = f"{kind}, {node.name}"
    joined = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if need is None or need.state or (node.target is torch.cat and joined != 1):
        raise refused(where or "the network", kind)
    if changes and len(inputs[0].users) > 1:
        raise refused(where, kind, "it changes in place what other parts read")
    graph.needs[node] = need
    if graph.pools(node):
        graph.constant.add(node)


def _copy_summed_image(graph: Graph) -> None:
    """Where sums of the image itself are asked for, a copy of it takes its place: only maps of passes are summed."""
    users = [n for n in graph.image.users if graph.needs.get(n, Need()).statistics]
    if users:
        with graph.graph.inserting_after(graph.image):
            again = graph.graph.call_function(operator.pos, (graph.image,))
        graph.needs[again] = Need()
        for user in users:
            user.replace_input_with(graph.image, again)


def graph_multiple(network: nn.Module, rank: int) -> tuple[int, ...]:
    """What the sizes of an image must be multiples of, so that every map has whole cells."""
    graph = traced(network)
    sizes = {graph.image: (Fraction(1),) * rank}
    for node, need in graph.needs.items():
        sizes.setdefault(node, sizes[graph.image])
        if node not in graph.constant:
            given = sizes.get(graph.rowed(node)[0], sizes[graph.image])
            both = zip(given, rates(need, rank), strict=True)
            sizes[node] = tuple(size * up / down for size, (down, up) in both)
    return tuple(math.lcm(*(size[axis].denominator for size in sizes.values())) for axis in range(rank))


def shapes_of(graph: Graph, image: Stream) -> Shapes:
    """The shape of every value, found without data. Raises ConfigError where rows do not become whole rows."""
    shaper = _Shaper(fx.GraphModule(copy.deepcopy(graph.network).to("meta"), graph.graph))
    dtype = next((p.dtype for p in graph.network.parameters()), torch.float32)
    shaper.run(torch.empty(1, image.channels, *image.space, device="meta", dtype=dtype))
    for node, need in graph.needs.items():
        found, ((down, up),) = shaper.found[node.name], rates(need, 1)
        given = [shaper.found[n.name] for n in graph.rowed(node)]
        if node in graph.constant:
            if math.prod(found) != given[0][1]:
                raise refused(node.name, str(node.target), "it is not the mean over all axes of the image")
            continue
        if any(len(found) != len(shape) or found[2] * down != shape[2] * up for shape in given):
            raise refused(node.name, str(node.target), f"maps {given} become {found}")
        beside = [shaper.found[n.name] for n in node.all_input_nodes if n in graph.constant]
        if any(len(shape) > len(found) - 3 and shape[2 - len(found)] != 1 for shape in beside):
            raise refused(node.name, str(node.target), "it adds something that differs from row to row")
    return shaper.found
