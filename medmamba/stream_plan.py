"""A network turned into passes over the rows of an image: what each reads, writes and carries, and in which order.

Rows run along the first spatial axis. Networks of steps say by themselves how they go (`stream_steps`), those that wear
others are theirs and a sum (`stream_members`), any other is traced (`stream_graph`); layers declare what they want
(`layers.need`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from medmamba.ensemble import MeanOfFolds
from medmamba.layers.planes import OnPlanes
from medmamba.stream_graph import by_graph
from medmamba.stream_members import MEMBERS
from medmamba.stream_pass import IMAGE, SCORES, Pass, Stream
from medmamba.stream_steps import by_steps
from medmamba.stream_trace import graph_multiple


@torch.no_grad()
def plan(network: nn.Module, channels: int, shape: Sequence[int]) -> list[Pass]:
    """The passes of `network` over an image of `shape`, padded at the far ends; the last one writes the scores.

    Raises ConfigError naming a part that cannot stream.
    """
    network.eval()
    space = tuple(-(-n // m) * m for n, m in zip(shape, multiple(network, len(shape)), strict=True))
    passes = planned(network, Stream(name=IMAGE, space=space, channels=channels), "", tuple(shape))
    (scores,) = passes[-1].writes
    passes[-1] = replace(passes[-1], writes=(replace(scores, name=SCORES),))
    last = {stream.name: number for number, p in enumerate(passes) for stream in (*p.reads, *p.writes)}
    done = [
        tuple(
            {
                s.name: s for s in (*p.reads, *p.writes) if last[s.name] == number and s.name not in (IMAGE, SCORES)
            }.values()
        )
        for number, p in enumerate(passes)
    ]
    return [replace(p, frees=freed) for p, freed in zip(passes, done, strict=True)]


def planned(network: nn.Module, image: Stream, name: str, shape: tuple[int, ...]) -> list[Pass]:
    """The passes of a network, or of one inside another, whose maps' names begin with `name`."""
    wearing = MEMBERS.get(type(network))
    if wearing is not None:
        return wearing(network, image, name, shape, planned)
    return by_steps(network, image, name) if has_steps(network) else by_graph(network, image, name)


def has_steps(network: Any) -> bool:
    """Whether it is a stem, a body of steps and scores of its halves."""
    return all(hasattr(network, part) for part in ("stem", "body", "scores", "grid"))


def require_streamable(network: nn.Module, channels: int, rank: int) -> None:
    """Raises ConfigError naming the part of `network` that cannot stream."""
    plan(network, channels, tuple(4 * n for n in multiple(network, rank)))


def multiple(network: nn.Module, rank: int) -> tuple[int, ...]:
    """The sizes of an image are padded at the far ends to multiples of these."""
    if type(network) in MEMBERS:
        worn: Any = network.folds[0] if isinstance(network, MeanOfFolds) else network.network
        return (1, *multiple(worn, rank - 1)) if isinstance(network, OnPlanes) else multiple(worn, rank)
    own: Any = network
    return tuple(own.config.multiple) if has_steps(own) else graph_multiple(own, rank)


def scratch_numbers(passes: Sequence[Pass]) -> int:
    """How many numbers stand on the disk at once, at most."""
    held = peak = 0
    for p in passes:
        held += sum(s.numbers for s in p.writes if s.name != SCORES)
        peak = max(peak, held)
        held -= sum(s.numbers for s in p.frees)
    return peak
