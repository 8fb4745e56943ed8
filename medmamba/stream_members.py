"""Networks that wear networks (`medmamba.ensemble`) as passes: those of each member, and what joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.ensemble import Disagreement, MeanOfFolds, Mirrored, Moments
from medmamba.layers.nd import channels_first, channels_last
from medmamba.layers.need import Need
from medmamba.layers.planes import OnPlanes
from medmamba.stream_pass import Pass, Place, Stream

Planner = Callable[[nn.Module, Stream, str, tuple[int, ...]], list[Pass]]


def by_folds(network: Any, image: Stream, name: str, shape: tuple[int, ...], planned: Planner) -> list[Pass]:
    """The folds one after another; their scores stand side by side until the last one is there."""
    passes, scores = list[Pass](), list[Stream]()
    for number, fold in enumerate(network.folds):
        passes += planned(fold, image, f"{name}folds.{number}.", shape)
        scores += passes[-1].writes

    def combine(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [channels_last(network.combined([channels_first(part).float() for part in parts]))], None

    return [*passes, _tail(f"{name}folds", tuple(scores), combine, network.combined_channels(scores[0].channels))]


def by_mirrorings(network: Any, image: Stream, name: str, shape: tuple[int, ...], planned: Planner) -> list[Pass]:
    """Each mirroring of the image in turn, its scores turned back and added to the sum of those before."""
    passes = planned(network.network, image, name, shape)
    (total,) = passes[-1].writes
    for number, flip in enumerate(network.flips[1:], start=1):
        axes = tuple(axis - 2 for axis in flip)
        passes += planned(network.network, replace(image, turn=axes), f"{name}flips.{number}.", shape)
        (scores,) = passes[-1].writes
        share = len(network.flips) if number == len(network.flips) - 1 else 1
        add = _added(total, scores, axes, shape, share, f"{name}flips.{number}")
        passes.append(add)
        (total,) = add.writes
    return passes


def _added(total: Stream, scores: Stream, axes: tuple[int, ...], shape: tuple[int, ...], share: int, name: str) -> Pass:
    """(total + scores, mirrored back along `axes` of `shape`) / `share`."""

    def work(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        sums, other = parts
        inside = other[(slice(None), slice(None), *(slice(n) for n in shape[1:]))].flip([a + 1 for a in axes])
        lacking = [n - m for n, m in zip(sums.shape[1:-1], inside.shape[1:-1], strict=True)]
        back = F.pad(inside, (0, 0, *(p for n in reversed(lacking) for p in (0, n))))  # beyond the shape: dropped later
        return [(sums + back) / share], None

    mirror = shape[0] if 0 in axes else 0
    made = replace(total, name=f"{name}.sum")
    return Pass(name=made.name, reads=(total, scores), writes=(made,), work=work, need=Need(), mirror=mirror)


def by_planes(network: Any, image: Stream, name: str, shape: tuple[int, ...], planned: Planner) -> list[Pass]:
    """A network of planes, one after another: no plane needs another one."""

    def work(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        planes = channels_first(parts[0]).contiguous().split(1, dim=2)
        return [channels_last(torch.cat([network(plane) for plane in planes], dim=2))], None

    like = next(network.parameters(), torch.empty(0))
    ((one,), _) = work([like.new_zeros(1, 1, *image.row)], Place(rows=slice(None)))
    made = Stream(name=f"{name}planes.scores", space=image.space, channels=one.shape[-1])
    return [Pass(name=f"{name}planes", reads=(image,), writes=(made,), work=work, need=Need())]


def by_disagreement(network: Any, image: Stream, name: str, shape: tuple[int, ...], planned: Planner) -> list[Pass]:
    """The moments of the members, and what they tell cell by cell."""
    passes = planned(network.network, image, name, shape)

    def tell(parts: list[Tensor], at: Place) -> tuple[Sequence[Tensor], None]:
        return [channels_last(network.told(channels_first(parts[0])))], None

    scores = passes[-1].writes
    return [*passes, _tail(f"{name}disagreement", scores, tell, scores[0].channels // 2 + 1)]


def _tail(name: str, reads: tuple[Stream, ...], work: Any, channels: int) -> Pass:
    """A pass cell by cell."""
    made = replace(reads[0], name=f"{name}.scores", channels=channels)
    return Pass(name=name, reads=reads, writes=(made,), work=work, need=Need())


MEMBERS: dict[type[nn.Module], Callable[..., list[Pass]]] = {
    MeanOfFolds: by_folds,
    Moments: by_folds,
    Mirrored: by_mirrorings,
    OnPlanes: by_planes,
    Disagreement: by_disagreement,
}
