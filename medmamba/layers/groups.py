"""Cutting a map into groups of positions that attend to each other, and joining them again; any rank.

Letters in this file: B batch, G groups, L members of a group, C channels. Maps are channels-last, (B, *space, C).
`contiguous`: a group is a box of neighbours. `interleaved`: a group takes every s-th position along each axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Each axis seen as two factors; one of them counts the groups, the other the members of a group."""

    factors: tuple[tuple[int, int], ...]
    member: int  # which factor of every axis counts the members: 0 or 1

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of the factored map, groups before members."""
        rank = range(len(self.factors))
        return (
            0,
            *(2 - self.member + 2 * i for i in rank),
            *(1 + self.member + 2 * i for i in rank),
            2 * len(rank) + 1,
        )

    def split(self, x: Tensor) -> Tensor:
        """(B, *space, C) -> (B, G, L, C)."""
        flat = [n for pair in self.factors for n in pair]
        rank = len(self.factors)
        parts = x.reshape(len(x), *flat, x.shape[-1]).permute(self.order)
        return parts.flatten(rank + 1, 2 * rank).flatten(1, rank)

    def join(self, groups: Tensor) -> Tensor:
        """The inverse of `split`."""
        counts = [pair[1 - self.member] for pair in self.factors]
        members = [pair[self.member] for pair in self.factors]
        parts = groups.reshape(len(groups), *counts, *members, groups.shape[-1])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return parts.permute(back).reshape(len(groups), *(a * b for a, b in self.factors), groups.shape[-1])


def contiguous(space: Sequence[int], size: Sequence[int]) -> Groups:
    """Boxes of `size` neighbours; ShapeError unless they tile the map."""
    return Groups(factors=tuple((n // g, g) for n, g in _whole(space, size)), member=1)


def interleaved(space: Sequence[int], steps: Sequence[int]) -> Groups:
    """Every `steps`-th position; ShapeError unless the steps divide the map."""
    return Groups(factors=tuple((n // s, s) for n, s in _whole(space, steps)), member=0)


def pad_ends(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Zeros at the far end of every axis of (B, *space, C) up to `sides`."""
    missing = [after for n, side in zip(x.shape[-2:0:-1], tuple(sides)[::-1]) for after in (0, side - n)]
    return F.pad(x, (0, 0, *missing)) if any(missing) else x


def cut_ends(x: Tensor, sides: Sequence[int]) -> Tensor:
    """The inverse of `pad_ends`: the first `sides` positions of every axis."""
    for axis, length in enumerate(sides, start=1):
        x = x.narrow(axis, 0, length)
    return x


def padded_positions(space: Sequence[int], sides: Sequence[int], device: torch.device) -> Tensor:
    """(1, *sides, 1), True where `pad_ends` put zeros."""
    inside = torch.zeros((1, *space, 1), dtype=torch.bool, device=device)
    missing = [after for n, side in zip(tuple(space)[::-1], tuple(sides)[::-1]) for after in (0, side - n)]
    return F.pad(inside, (0, 0, *missing), value=True)


def multiple_of(length: int, step: int) -> int:
    """The smallest multiple of `step` that is no smaller than `length`."""
    return -(-length // step) * step


def _whole(space: Sequence[int], parts: Sequence[int]) -> list[tuple[int, int]]:
    if any(n % part for n, part in zip(space, parts, strict=True)):
        raise ShapeError(f"a map of {tuple(space)} does not fall into parts of {tuple(parts)}; pad it first")
    return list(zip(space, parts))
