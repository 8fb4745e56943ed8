"""Layers whose inputs are computed back from their outputs, so that training keeps one state whatever the depth.

A stream is a dense channels-last map (B, *space, C), any rank; a state is a tuple of streams, the first two of which
are the halves a and b that couplings work on. A body is a list of steps, state -> state, run in one of three ways with
the same weights: "stored" (plain autograd), "stages" (couplings between two changes of shape are recomputed), "full"
(everything is, the head too: one autograd Function over the list).
Coupling: Dinh et al., "NICE" (2014), equations 6 to 9; Gomez et al., "The Reversible Residual Network" (2017).
With increments on a grid (`layers.grid`) the sums are exact and the gradients of the three ways are equal bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.grid import Snap

State = tuple[Tensor, ...]
Again = Callable[[nn.Module], AbstractContextManager[None]]
"""Opens the surroundings of a module's forward pass once more, for its recomputation."""

MODES = ("stored", "stages", "full")


class Step(nn.Module):
    """One element of a body; this base is for those that cannot be undone. `stays`: shapes do not change and only the
    halves are touched. `takes`: how many streams it looks at, the others pass by. `unit`: how many cells of the first
    stream belong together, per axis; none: one."""

    stays = False
    takes: int = 2
    unit: tuple[int, ...] = ()

    def forward(self, state: State, snap: Snap) -> State:
        raise NotImplementedError


class Invertible(Step):
    """A step with an inverse. `undo` is written in terms of both; a step that can share work overrides it. `gives`: how
    many streams it makes of those it takes."""

    gives: int = 2

    def inverse(self, state: State, snap: Snap) -> State:
        raise NotImplementedError

    def undo(self, outputs: State, grads: State, snap: Snap, again: Again) -> tuple[State, State, list[Tensor | None]]:
        """Outputs and their gradients -> inputs, their gradients, gradients of the learned parameters in order."""
        with again(self):
            inputs = self.inverse(outputs, snap)
        with again(self), torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in inputs)
            redone = self(leaves, snap)
        below, own = backwards(redone, leaves, learned(self), grads)
        return inputs, below, own


class Add(Invertible):
    """One half of a coupling: stream `into` += branch(the other stream)."""

    stays = True

    def __init__(self, branch: nn.Module, *, into: int) -> None:
        super().__init__()
        if into not in (0, 1):
            raise ConfigError(f"a coupling adds to stream 0 or 1, got {into}")
        self.branch, self.into = branch, into

    def forward(self, state: State, snap: Snap) -> State:
        return self._changed(state, state[self.into] + snap(self.branch(state[1 - self.into])))

    def inverse(self, state: State, snap: Snap) -> State:
        return self._changed(state, state[self.into] - snap(self.branch(state[1 - self.into])))

    def undo(self, outputs: State, grads: State, snap: Snap, again: Again) -> tuple[State, State, list[Tensor | None]]:
        """One evaluation of the branch serves the inverse and the gradient."""
        with again(self), torch.enable_grad():
            source = outputs[1 - self.into].detach().requires_grad_()
            change = snap(self.branch(source))
        inputs = self._changed(outputs, outputs[self.into] - change.detach())
        (below,), own = backwards((change,), (source,), learned(self), (grads[self.into],))
        other = list(grads)
        other[1 - self.into] = grads[1 - self.into] + below
        return inputs, tuple(other), own

    def _changed(self, state: State, stream: Tensor) -> State:
        return (stream, state[1], *state[2:]) if self.into == 0 else (state[0], stream, *state[2:])


class Undone(Invertible):
    """A step run the other way round: down becomes up."""

    def __init__(self, step: Invertible) -> None:
        super().__init__()
        self.step, self.takes = step, step.gives

    def forward(self, state: State, snap: Snap) -> State:
        return self.step.inverse(state, snap)

    def inverse(self, state: State, snap: Snap) -> State:
        out: State = self.step(state, snap)
        return out


def coupling(first: nn.Module, second: nn.Module) -> list[Add]:
    """a += first(b), then b += second(a)."""
    return [Add(first, into=0), Add(second, into=1)]


class Reversible(nn.Module):
    """A body of steps and, if given, a head state -> Tensor at its end; `forward(state, snap, memory)`.

    Gives the last state, or what the head makes of it. Raises ConfigError for an unknown `memory`, and for "full" when
    a step cannot be undone. No second derivatives outside "stored".
    """

    def __init__(self, steps: Sequence[Step], head: nn.Module | None = None) -> None:
        super().__init__()
        self.steps, self.head = nn.ModuleList(steps), head

    def forward(self, state: State, snap: Snap, memory: str = "full") -> State | Tensor:
        self.check(memory)
        body: list[Step] = [*self.steps]  # type: ignore[list-item]
        if memory == "stored" or not torch.is_grad_enabled():
            for step in body:
                state = snap.watched(step(state, snap), state)
            return state if self.head is None else self.head(state)
        if memory == "full":
            return _recomputed(body, self.head, state, snap)
        for stays, steps in itertools.groupby(body, key=lambda step: step.stays):
            if stays:
                halves = _recomputed(list(steps), None, state[:2], snap)
                state = (*halves, *state[2:])
            else:
                for step in steps:
                    state = snap.watched(step(state, snap), state)
        return state if self.head is None else self.head(state)

    def check(self, memory: str) -> None:
        """Raises ConfigError unless this body can run in the mode."""
        if memory not in MODES:
            raise ConfigError(f"unknown memory mode {memory!r}; known: {', '.join(MODES)}")
        fixed = sorted({type(s).__name__ for s in self.steps if not isinstance(s, Invertible)})
        if memory == "full" and fixed:
            raise ConfigError(f"memory='full': {', '.join(fixed)} cannot be undone; use 'stages', or down='haar'")


def learned(*modules: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that want gradients, each once."""
    found = (p for m in modules if m is not None for p in m.parameters() if p.requires_grad)
    return list({id(p): p for p in found}.values())


def backwards(
    outputs: State, leaves: State, parameters: Sequence[nn.Parameter], grads: State
) -> tuple[State, list[Tensor | None]]:
    """Gradients of `outputs` (weighed by `grads`) for leaves (zeros where nothing arrives) and for parameters."""
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs:
        return tuple(map(torch.zeros_like, leaves)), [None] * len(parameters)
    ends, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(ends, (*leaves, *parameters), weights, allow_unused=True)
    below = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=False))
    return tuple(below), list(found[len(leaves) :])


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a module met in its forward pass: autocast, and the random generators if it drew from them."""

    autocast: tuple[str, torch.dtype, bool]
    cuda: torch.device | None
    generators: tuple[Tensor, ...] | None

    @contextmanager
    def again(self, module: nn.Module) -> Iterator[None]:
        """The same surroundings; running statistics that change inside are thrown away."""
        devices, drew = [self.cuda] if self.cuda else [], self.generators is not None
        with torch.random.fork_rng(devices, enabled=drew), cast(self.autocast):
            if self.generators is not None:
                torch.set_rng_state(self.generators[0])
                if self.cuda:
                    torch.cuda.set_rng_state(self.generators[1], self.cuda)
            with throwaway_buffers(module):
                yield


def cast(autocast: tuple[str, torch.dtype, bool]) -> torch.autocast:
    """Autocast without its cache of weights: a cast made without gradient must not serve a pass with one."""
    kind, dtype, enabled = autocast
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


@contextmanager
def throwaway_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers replaced by copies inside, and put back: batch statistics are counted once, in the forward pass."""
    kept = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for owner, name, buffer in kept:
        owner._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            owner._buffers[name] = buffer


class Recording:
    """One forward pass through steps and head, with what is needed to go back."""

    def __init__(self, steps: list[Step], head: nn.Module | None, state: State, snap: Snap) -> None:
        kind = state[0].device.type
        kind = kind if torch.amp.is_autocast_available(kind) else "cpu"
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.cuda = state[0].device if kind == "cuda" else None
        self.steps, self.head, self.snap = steps, head, snap
        self.parameters = learned(*steps, head)
        self.versions = [p._version for p in self.parameters]
        self.met: list[Surroundings] = []

    def forward(self, state: State) -> tuple[State, State | Tensor]:
        """The last state, and what comes out: that state or the head's output."""
        with cast(self.autocast):
            for step in self.steps:
                state = self.snap.watched(self._run(step, state, self.snap), state)
            return state, state if self.head is None else self._run(self.head, state)

    def _run(self, module: nn.Module, *arguments: Any) -> Any:
        before = self._generators()
        out = module(*arguments)
        drew = any(not torch.equal(a, b) for a, b in zip(before, self._generators(), strict=True))
        self.met.append(Surroundings(self.autocast, self.cuda, before if drew else None))
        return out

    def _generators(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        return (cpu,) if self.cuda is None else (cpu, torch.cuda.get_rng_state(self.cuda))

    def backward(self, last: list[Tensor], grads: State) -> tuple[State, list[Tensor | None]]:
        """From the last state (the list is emptied, so that it can be freed on the way) and the gradients of what came
        out: gradients of the first state and of the parameters."""
        if self.versions != [p._version for p in self.parameters]:
            raise RuntimeError("a parameter was changed in place between forward and backward: its gradient is lost")
        state, sums, surroundings = tuple(last), dict[nn.Parameter, Tensor](), list(self.met)
        last.clear()
        if self.head is not None:
            with surroundings.pop().again(self.head), torch.enable_grad():
                leaves = tuple(x.detach().requires_grad_() for x in state)
                out = self.head(leaves)
            grads, own = backwards((out,), leaves, learned(self.head), grads)
            del leaves, out
            add_up(sums, learned(self.head), own)
        for step in reversed(self.steps):
            assert isinstance(step, Invertible)
            state, grads, own = step.undo(state, grads, self.snap, surroundings.pop().again)
            add_up(sums, learned(step), own)
        return grads, [sums.get(p) for p in self.parameters]


def add_up(sums: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter], grads: list[Tensor | None]) -> None:
    """Gradients of a parameter used several times are added in the order in which autograd meets them."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            sums[parameter] = sums[parameter] + grad if parameter in sums else grad


class _Recomputed(torch.autograd.Function):
    """The whole list as one node of the graph. It keeps the last state and nothing else."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, count: int, *tensors: Tensor) -> State | Tensor:
        last, out = recording.forward(tensors[:count])
        ctx.recording = recording
        ctx.save_for_backward(*last)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a recomputed body has no second derivatives; use memory='stored' with create_graph")
        last = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept for a second use
        below, own = ctx.recording.backward(last, grads)
        return (None, None, *below, *own)


def _recomputed(steps: list[Step], head: nn.Module | None, state: State, snap: Snap) -> Any:
    if torch.compiler.is_compiling():  # opaque: a compiled first pass and a plain second one would differ in bits
        return torch.compiler.disable(_recomputed)(steps, head, state, snap)
    recording = Recording(steps, head, state, snap)
    return _Recomputed.apply(recording, len(state), *state, *recording.parameters)
