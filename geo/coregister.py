"""How far two dates of one grid are shifted against each other, block by block, and whether that was corrected.

Per block: phase correlation (unnormalised cross-power spectrum, 1/50 px) of the two grey images, smoothed, under a Hann
window; the second date is read again moved by the whole pixels found, so that the fraction is measured on the same
ground. One shift for the scene, the median; what is left per block is the residual map.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.registration import phase_cross_correlation

from geo.align import seen_on
from geo.scene import Scene
from medmamba.errors import InputError
from medmamba.windows import Window

BLOCK = 256  # cells a side
BLOCKS_A_SIDE = 6  # at most 36 blocks a scene, spread evenly
MARGIN = 12  # cells left free at the frame where the scene is large enough
UPSAMPLING = 50
SMOOTHING = 1.0  # cells: interpolation turns the phase of the finest texture, so it does not vote
LEAST_VALID = 0.5  # share of a block that both dates must show
LEAST_CORRELATION = 0.35  # of the two blocks after the shift: below, they do not show the same
SPREAD = 1.4826  # median absolute deviation to standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """In pixels of the grid: below `least` nothing is moved; above `largest`, or with blocks that disagree by more than
    `largest_spread`, the pair is refused."""

    least: float = 0.1
    largest: float = 8.0
    largest_spread: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShift:
    """Where (centre cell) and how far the second date lies off there, in pixels (rows, cols); `correlation` after."""

    row: float
    col: float
    rows_px: float
    cols_px: float
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """`verdict` ("applied", "not applied", "refused") with its `reason`; the scene's shift and spread in pixels before,
    the same after what was applied, and the blocks before."""

    verdict: str
    reason: str
    shift_px: tuple[float, float] = (0.0, 0.0)
    spread_px: float = 0.0
    left_px: tuple[float, float] = (0.0, 0.0)
    blocks: tuple[BlockShift, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def require(self) -> None:
        """Raises InputError("misregistered") when the pair was refused."""
        if self.verdict == "refused":
            raise InputError("misregistered", f"the dates do not lie on each other: {self.reason}; register them first")


def coregister(before: Scene, after: Scene, limits: Limits = Limits()) -> tuple[Scene, Registration]:
    """`after` moved onto `before` (same grid) where that is needed and safe, resampled once from its own file."""
    blocks, tried = block_shifts(before, after)
    if len(blocks) < min(3, tried):
        reason = f"{len(blocks)} of {tried} blocks show the same texture on both dates: too few to tell a shift"
        return after, Registration(verdict="not applied", reason=reason, blocks=blocks)
    shift, spread = middle_of(blocks)
    length = float(np.hypot(*shift))
    told = f"shift {shift[0]:+.2f} rows {shift[1]:+.2f} columns, spread {spread:.2f} px over {len(blocks)} blocks"
    known = Registration(
        verdict="not applied", reason=told, shift_px=shift, spread_px=spread, left_px=shift, blocks=blocks
    )
    if length > limits.largest or spread > limits.largest_spread:
        why = f"{told}, above the limit of {limits.largest} px (spread {limits.largest_spread} px)"
        return after, replace(known, verdict="refused", reason=why)
    if length < limits.least:
        return after, replace(known, reason=f"{told}: below {limits.least} px")
    moved = seen_on(after, before.grid, shift_px=shift)
    again, _ = block_shifts(before, moved)
    left = middle_of(again)[0] if again else shift
    if np.hypot(*left) >= length:
        return after, replace(known, reason=f"{told}, but moving it leaves {np.hypot(*left):.2f} px: not a shift")
    return moved, replace(known, verdict="applied", left_px=left)


def block_shifts(before: Scene, after: Scene) -> tuple[tuple[BlockShift, ...], int]:
    """The shift of each usable block, and how many blocks were looked at."""
    found = []
    windows = lattice(before.grid.shape)
    for window in windows:
        fixed = grey(before, window)
        whole = np.zeros(2, dtype=int)
        fraction = np.zeros(2)
        moving = None if fixed is None else grey(after, window)
        for _ in range(2):
            if fixed is None or moving is None:
                break
            step = -phase_cross_correlation(fixed, moving, upsample_factor=UPSAMPLING, normalization=None)[0]
            moved = np.rint(step).astype(int)
            fraction = step - moved
            if not moved.any():
                break
            place = Window(start=tuple(np.add(window.start, whole + moved)), size=window.size)
            if place.clip(before.grid.shape) != place:
                moving = None
                break
            whole += moved
            moving = grey(after, place)
        if fixed is None or moving is None:
            continue
        likeness = float((fixed * moving).sum() / np.sqrt((fixed**2).sum() * (moving**2).sum()))
        if likeness >= LEAST_CORRELATION:
            row, col = (s + n / 2 - 0.5 for s, n in zip(window.start, window.size, strict=True))
            rows, cols = (float(v) for v in whole + fraction)
            found.append(BlockShift(row=row, col=col, rows_px=rows, cols_px=cols, correlation=likeness))
    return tuple(found), len(windows)


def lattice(shape: tuple[int, ...]) -> list[Window]:
    """At most BLOCKS_A_SIDE^2 blocks, evenly spread; a margin is left so that a block can be read again moved."""
    inner = [n - 2 * MARGIN if n > 4 * MARGIN else n for n in shape]
    size = [min(BLOCK, n) for n in inner]
    counts = [min(BLOCKS_A_SIDE, max(1, n // s)) for n, s in zip(inner, size, strict=True)]
    starts = [
        (n - i) // 2 + np.linspace(0, i - s, c).astype(int)
        for n, i, s, c in zip(shape, inner, size, counts, strict=True)
    ]
    rows, cols = starts
    return [Window(start=(int(r), int(c)), size=(size[0], size[1])) for r in rows for c in cols]


def grey(scene: Scene, window: Window) -> np.ndarray | None:
    """Mean of the standardised bands under a Hann window, (rows, cols), mean 0; None where too little can be seen."""
    image = scene.read(window)
    valid = np.ones(window.size, dtype=bool) if image.valid is None else image.valid
    if valid.mean() < LEAST_VALID:
        return None
    total = np.zeros(window.size)
    for band in image.array.astype(np.float64):
        mean, deviation = band[valid].mean(), band[valid].std()
        if deviation > 0:
            total += np.where(valid, (band - mean) / deviation, 0.0)
    if not total.any():
        return None
    hann = np.outer(*(np.hanning(n + 2)[1:-1] for n in window.size))
    smooth = gaussian_filter(total, SMOOTHING)
    return (smooth - smooth.mean()) * hann


def middle_of(blocks: tuple[BlockShift, ...]) -> tuple[tuple[float, float], float]:
    """Median shift (rows, cols) and the larger spread of the two axes."""
    shifts = np.array([(b.rows_px, b.cols_px) for b in blocks])
    middle = np.median(shifts, axis=0)
    spread = SPREAD * np.median(np.abs(shifts - middle), axis=0)
    return (float(middle[0]), float(middle[1])), float(spread.max())
