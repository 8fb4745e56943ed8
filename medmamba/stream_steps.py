"""Networks of a stem, a body of steps and a head as passes (`medmamba.layers.reversible`).

A coupling without a mixer is one pass with a halo, one with a mixer two: a sweep from the last slab to the first, which
leaves the state behind every slab and the sum over all of them, and a pass from the first to the last. Ways down and up
are cut at multiples of the stride of their level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.layers.grid import Snap
from medmamba.layers.nd import channels_first
from medmamba.layers.need import Need, need_of
from medmamba.layers.reversible import Add, Step
from medmamba.stream_pass import Pass, Place, Stream


def by_steps(network: Any, image: Stream, name: str) -> list[Pass]:
    """A stem, a body of steps on a state of streams, and scores of its halves. Raises ConfigError naming a part."""
    snap: Snap = network.grid()
    like = next(network.parameters())

    def stem(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [half[:, at.rows] for half in network.stem(channels_first(parts[0]), snap)], None

    def head(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [network.scores(tuple(parts))], None

    state = _made(f"{name}stem", lambda parts: stem(parts, Place(rows=slice(None)))[0], (image,), (), like)
    passes = [Pass(name=f"{name}stem", reads=(image,), writes=state, work=stem, need=need_of(network.stem, "stem"))]
    for number, step in enumerate(network.body.steps):
        make = _coupling if isinstance(step, Add) else _change
        state, more = make(f"{name}body.steps.{number}", step, state, snap, like)
        passes += more
    (scores,) = _made(f"{name}scores", lambda parts: [network.scores(tuple(parts))], state[:2], (), like)
    return [*passes, Pass(name=f"{name}head", reads=state[:2], writes=(scores,), work=head, need=Need())]


def _coupling(
    name: str, step: Add, state: tuple[Stream, ...], snap: Snap, like: Tensor
) -> tuple[tuple[Stream, ...], list[Pass]]:
    """The state after a coupling, and the passes that make it: one, or two when its branch has a mixer."""
    branch: Any = step.branch
    source, into = state[1 - step.into], state[step.into]
    made = replace(into, name=name)
    after = (made, *state[1:]) if step.into == 0 else (state[0], made, *state[2:])
    need, mixer = need_of(branch, f"{name}.branch"), getattr(branch, "mixer", None)
    if mixer is None:

        def add(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
            return [parts[1] + snap(branch(parts[0])[:, at.rows])], None

        return after, [Pass(name=name, reads=(source, into), writes=(made,), work=add, need=need)]

    cells = math.prod(into.space)
    mixed = Stream(name=f"{name}.mixed", space=into.space, channels=mixer.width)

    def gather(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], Tensor]:
        t = branch.before_mixer(parts[0])[:, at.rows].contiguous()
        return [t], mixer.gather(t, at.carried)

    def mix(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], Tensor | None]:
        t, old = parts
        y, ahead = mixer.stream(t, at.carried, at.behind, at.whole, cells)
        return [old + snap(branch.out(t + y))], ahead

    cell = like.new_zeros((1,) * len(source.space) + (1, source.channels))
    left = tuple(gather([cell], Place(rows=slice(None)))[1].shape)
    sweep = Pass(
        name=f"{name}.sweep", reads=(source,), writes=(mixed,), work=gather, need=need, backward=True, state=left
    )
    ahead = left if need.state else ()
    own = replace(need, halo=0)
    return after, [
        sweep,
        Pass(name=name, reads=(mixed, into), writes=(made,), work=mix, need=own, state=ahead, sweep=sweep),
    ]


def _change(
    name: str, step: Step, state: tuple[Stream, ...], snap: Snap, like: Tensor
) -> tuple[tuple[Stream, ...], list[Pass]]:
    """The state after a way down or up, and the pass that makes it; streams that it hands through stay as they are."""

    def work(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [new for new in step(tuple(parts), snap) if all(new is not old for old in parts)], None

    reads, unit = state[: step.takes], step.unit
    made = _made(name, lambda parts: step(tuple(parts), snap), reads, unit, like)
    writes = tuple(s for s in made if s not in reads)
    one = Pass(name=name, reads=reads, writes=writes, work=work, need=Need(unit=unit[0] if unit else 1))
    return (*made, *state[step.takes :]), [one]


def _made(
    name: str,
    work: Callable[[list[Tensor]], Sequence[Tensor]],
    reads: tuple[Stream, ...],
    unit: tuple[int, ...],
    like: Tensor,
) -> tuple[Stream, ...]:
    """The streams that come out, their shapes learned from the smallest piece: `unit` cells of the first stream."""
    first = reads[0].space
    small = unit or (1,) * len(first)
    sizes = [[n * u // f for n, u, f in zip(s.space, small, first, strict=True)] for s in reads]
    parts = [like.new_zeros(1, *size, s.channels) for size, s in zip(sizes, reads, strict=True)]
    streams = []
    for number, out in enumerate(work(parts)):
        same = [s for s, part in zip(reads, parts, strict=True) if out is part]
        space = tuple(n * f // u for n, f, u in zip(out.shape[1:-1], first, small, strict=True))
        streams.append(same[0] if same else Stream(name=f"{name}.{number}", space=space, channels=out.shape[-1]))
    return tuple(streams)
