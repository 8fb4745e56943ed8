"""Frames to a stack: sorted by position along the normal, every fault of the stack refused by its own code.

LPS (DICOM) becomes RAS here. Letters: N frames, V volumes (time points, echoes), S slices of one volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmamba.errors import InputError

SAME_ORIENTATION = 1e-3  # largest difference of two direction cosines
SAME_PLACE = 0.1  # of the smallest cell side: how far a slice may lie off its place in an even stack
ROUNDED_MM = 0.1  # some scanners write positions with one decimal
LARGEST_TILT = 45.0  # degrees; gantries tilt to 30
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """`order` (V, S) index of the frame at each place; `affine` (4, 4) array order (z, y, x) -> RAS+ mm; `notes`."""

    order: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...]


def stack(
    name: str,
    positions: np.ndarray,
    orientations: np.ndarray,
    spacing: Sequence[float],
    *,
    thickness: float | None,
    numbers: Sequence[int | None],
) -> Stack:
    """The stack of N frames: `positions` (N, 3), `orientations` (N, 6) in LPS mm, `spacing` between rows and columns.

    Slices may lean (a tilted gantry): the affine is then sheared and a note tells the angle. `numbers` (instance
    numbers) tell volumes at the same places apart. `thickness` is the step of a single slice.
    Raises InputError: mixed_orientations, duplicate_slice, missing_slice, uneven_slices, gantry_tilt, bad_geometry.
    """
    spread = np.abs(orientations - orientations[0]).max(axis=1)
    if spread.max() > SAME_ORIENTATION:
        raise InputError(
            "mixed_orientations",
            f"{name}: {int((spread > SAME_ORIENTATION).sum())} of {len(spread)} slices are turned against the first "
            f"({_list(orientations[0])} against {_list(orientations[spread.argmax()])}); give one orientation a series",
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 1e-2 or abs(row @ column) > 1e-2 or min(spacing) <= 0:
        raise InputError(
            "bad_geometry",
            f"{name}: orientation {_list(orientations[0])}, pixel spacing {_list(spacing)} mm: no plane; repair them",
        )
    normal = np.cross(row, column)
    depth = positions @ (normal / np.linalg.norm(normal))
    order = _volumes(name, depth, numbers)
    step, notes = _step(name, positions[order[0]], depth[order[0]], normal, spacing, thickness)
    for volume in order[1:]:
        shift = float(np.abs(positions[volume] - positions[order[0]]).max())
        if shift > SAME_PLACE * min(*spacing, float(np.linalg.norm(step))):
            raise InputError("uneven_slices", f"{name}: its {len(order)} volumes lie {shift:.3f} mm apart; split them")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, column * spacing[0], row * spacing[1]
    affine[:3, 3] = positions[order[0, 0]]
    return Stack(order=order, affine=LPS_TO_RAS @ affine, notes=notes)


def _volumes(name: str, depth: np.ndarray, numbers: Sequence[int | None]) -> np.ndarray:
    """Frames as (V, S), S rising along the normal. V > 1 only when each place holds V frames told apart by number."""
    rising = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[rising])
    same = gaps <= SAME_PLACE * np.median(gaps[gaps > 1e-4]) if (gaps > 1e-4).any() else gaps <= 1e-4
    places = np.split(rising, np.flatnonzero(~same) + 1)
    counts = [len(p) for p in places]
    if max(counts) == 1:
        return rising[None]
    volumes = counts[0] if len(set(counts)) == 1 else 0
    if volumes and all(n is not None for n in numbers) and len(set(numbers)) == len(numbers):
        by_number = np.array([sorted(p, key=lambda i: int(numbers[i] or 0)) for p in places]).T
        ranks = np.argsort(np.argsort([int(n or 0) for n in numbers]))
        block, turn = ranks[by_number] // len(places), ranks[by_number] % volumes
        rows = np.arange(volumes)[:, None]
        if np.array_equal(block, rows.repeat(len(places), 1)) or np.array_equal(turn, rows.repeat(len(places), 1)):
            return by_number
    worst = int(np.argmax(counts))
    raise InputError(
        "duplicate_slice",
        f"{name}: {counts[worst]} slices lie at one place ({depth[places[worst][0]]:.2f} mm along the stack, slice "
        f"{worst + 1} of {len(places)}); remove the copies or split the series",
    )


def _step(
    name: str,
    positions: np.ndarray,
    depth: np.ndarray,
    normal: np.ndarray,
    spacing: Sequence[float],
    thickness: float | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The vector from slice to slice (mm, LPS) of an even stack, and what must be told of it."""
    if len(depth) == 1:
        if not thickness or thickness <= 0:
            raise InputError("bad_geometry", f"{name}: one slice without a thickness; give the whole series")
        return normal * thickness, ("single slice: its thickness is taken as the step",)
    gaps = np.diff(depth)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    wide = np.flatnonzero(gaps > 1.5 * usual)
    if len(wide):
        multiples = gaps[wide] / usual
        at = wide[0]
        where = f"after slice {at + 1}: {depth[at]:.2f} mm to {depth[at + 1]:.2f} mm, usual step {usual:.3f} mm"
        if np.abs(multiples - np.rint(multiples)).max() > 2 * SAME_PLACE:
            raise InputError("uneven_slices", f"{name}: the slices are not evenly spaced ({where}); resample them")
        count = int(np.rint(multiples).sum()) - len(wide)
        raise InputError("missing_slice", f"{name}: {count} slices are missing, first {where}; copy the series again")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    off = np.linalg.norm(positions - positions[0] - np.arange(len(positions))[:, None] * step, axis=1)
    if off.max() > max(SAME_PLACE * min(*spacing, usual), min(ROUNDED_MM, usual / 4)):
        raise InputError(
            "uneven_slices",
            f"{name}: slice {int(off.argmax()) + 1} of {len(depth)} lies {off.max():.3f} mm off its place in an even "
            "stack; resample the series",
        )
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step) / np.linalg.norm(normal), -1, 1))))
    if tilt > LARGEST_TILT:
        raise InputError(
            "gantry_tilt", f"{name}: the slices lean {tilt:.1f} degrees, more than any gantry; repair the positions"
        )
    sideways = np.linalg.norm(positions[-1] - positions[0]) * np.sin(np.radians(tilt))
    if sideways < SAME_PLACE * min(spacing):
        return step, ()
    return step, (f"gantry_tilt: the slices lean {tilt:.2f} degrees; kept as a sheared grid",)


def _list(values: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{float(v):.4g}" for v in values) + "]"
