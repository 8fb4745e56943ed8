"""What a training step of a network takes in tensor bytes, measured or told beforehand, and the patch that still fits.

One definition for both: bytes of live tensor storage during forward, loss and backward, seen operation by operation.
`measure` runs the step on real data; `predict` the same operations on tensors without data (the meta device), which
costs a fraction of a second and no memory whatever the size. Weights, gradients, optimizer are counted apart.
Not seen: work space inside one operation, and what an allocator keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medmamba.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
ADAMW_COPIES = 4  # weights, gradients and AdamW's two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of one step. `held`: what autograd keeps between forward and backward; `peak`: largest sum of live tensors
    (weights, their gradients, image and labels not counted); `weights`: the parameters once."""

    held: int
    peak: int
    weights: int

    @property
    def total(self) -> int:
        """What a step under AdamW needs in all."""
        return self.peak + ADAMW_COPIES * self.weights


class LiveBytes(TorchDispatchMode):
    """While open, every storage that an operation makes is entered when it is born and when it is freed."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.changes: list[tuple[int, int]] = []  # (number of the storage, bytes: + born, - freed)
        self.left_out: set[int | None] = set()
        self.known = {_storage(t)._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(_storage(tensor))
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self.alive or place in self.known:
            return
        number, size = len(self.changes), storage.nbytes()
        self.alive[place] = number
        self.changes.append((number, size))
        weakref.finalize(storage, self._free, place, number, size)

    def _free(self, place: int, number: int, size: int) -> None:
        if self.alive.get(place) == number:
            del self.alive[place]
        self.changes.append((number, -size))

    def leave_out(self, tensor: Tensor) -> None:
        """What lies in the storage of this tensor, alive now, does not count."""
        self.left_out.add(self.alive.get(_storage(tensor)._cdata))

    def peak(self) -> int:
        """Largest sum of live bytes so far."""
        now = most = 0
        for number, size in self.changes:
            now += 0 if number in self.left_out else size
            most = max(most, now)
        return most


@dataclass
class Held:
    """Storages that autograd saves; `bytes` of those that are alive."""

    known: set[int]
    saved: dict[int, weakref.ref[Any]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        storages = (reference() for reference in self.saved.values())
        return sum(s.nbytes() for s in storages if s is not None)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self.known:
            self.saved[storage._cdata] = weakref.ref(storage)
        return tensor.detach()  # the tensor itself would keep its own graph alive


@contextmanager
def held_bytes(known: Sequence[Tensor] = ()) -> Iterator[Held]:
    """Counts what autograd saves inside; `known` tensors (weights, image, labels) are left out."""
    held = Held({_storage(t)._cdata for t in known})
    with torch.autograd.graph.saved_tensors_hooks(held.pack, _same):
        yield held


def measure(network: nn.Module, image: Tensor, labels: Tensor, loss: Loss = F.cross_entropy) -> Cost:
    """The cost of one training step on these tensors. Leaves gradients at None."""
    parameters = list(network.parameters())
    known = [image, labels, *parameters, *network.buffers()]
    network.zero_grad(set_to_none=True)
    with LiveBytes(known) as live, ExitStack() as hooks:
        for parameter in parameters:
            hooks.callback(parameter.register_hook(live.leave_out).remove)
            hooks.callback(parameter.register_post_accumulate_grad_hook(lambda p: live.leave_out(p.grad)).remove)
        with held_bytes(known) as held:
            value = loss(network(image), labels)
        kept = held.bytes
        value.backward()
    network.zero_grad(set_to_none=True)
    return Cost(held=kept, peak=live.peak(), weights=sum(p.numel() * p.element_size() for p in parameters))


def without_data(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, on the meta device: shapes only, made in milliseconds at any width."""
    with torch.device("meta"):
        return build().train()


def predict(
    network: nn.Module, shape: Sequence[int], *, memory: str | None = None, loss: Loss = F.cross_entropy
) -> Cost:
    """The cost of a step on an image (B, C, *space), by a network from `without_data`.

    `memory`: one of its modes, None as it is set. Labels are (B, *space) integers for `loss`.
    """
    if memory is not None:
        network.memory = memory  # type: ignore[assignment]
    image = torch.empty(*shape, device="meta")
    labels = torch.empty(shape[0], *shape[2:], dtype=torch.long, device="meta")
    return measure(network, image, labels, loss)


def choose_memory(
    network: nn.Module, shape: Sequence[int], budget_bytes: int, *, loss: Loss = F.cross_entropy
) -> tuple[str, Cost]:
    """The fastest memory mode whose step fits the budget, and its cost; the most sparing one when none does."""
    for mode in network.modes:  # type: ignore[union-attr]
        cost = predict(network, shape, memory=mode, loss=loss)
        if cost.total <= budget_bytes:
            break
    return mode, cost


def largest_patch(
    network: nn.Module,
    budget_bytes: int,
    *,
    batch: int = 1,
    memory: str | None = None,
    limit: Sequence[int] | None = None,
    loss: Loss = F.cross_entropy,
) -> tuple[tuple[int, ...], Cost]:
    """The largest patch (k times the network's `multiple` on every axis, not beyond `limit`) whose step fits.

    `network` from `without_data`, with a Config that has `in_channels`, `spatial_dims` and `multiple`. Raises
    ConfigError when even the smallest does not fit.
    """
    config: Any = network.config

    def at(k: int) -> tuple[tuple[int, ...], Cost]:
        patch = tuple(m * k for m in config.multiple)
        if limit is not None:
            patch = tuple(min(n, -(-top // m) * m) for n, m, top in zip(patch, config.multiple, limit, strict=True))
        return patch, predict(network, (batch, config.in_channels, *patch), memory=memory, loss=loss)

    fits, best = 1, at(1)
    if best[1].total > budget_bytes:
        raise ConfigError(
            f"a patch of {best[0]} takes {best[1].total >> 20} MiB, {budget_bytes >> 20} MiB may be used; "
            "raise the budget or choose a smaller network"
        )
    grown, step = True, 1  # doubled while it fits, then halved
    while step:
        tried = at(fits + step)
        if tried[1].total <= budget_bytes and tried[0] != best[0]:
            fits, best = fits + step, tried
        else:
            grown = False
        step = 2 * step if grown else step // 2
    return best


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _same(tensor: Tensor) -> Tensor:
    return tensor
