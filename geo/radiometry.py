"""The same stretch for both dates, and the second date brought to the first over pixels that did not change.

Normalisation: per band, after' = gain * after + offset. The line starts as the least median of absolute residuals over
lines through pairs of pixels (Rousseeuw: holds while most pixels did not change) and is refined by orthogonal fits over
the pixels within two robust deviations of it. Everything found is logged; a band with a poor fit is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geo.scene import Scene
from medmamba.errors import InputError
from medmamba.sample import Image
from medmamba.source import Source
from medmamba.windows import Window

SAMPLE_SIDE, SAMPLES_A_SIDE = 64, 8  # windows of 64 x 64 cells on a lattice of 8 x 8: a quarter of a million cells
CANDIDATES, JUDGES = 300, 2000  # lines tried, pixels that judge them
ROUNDS = 10
SPREAD = 1.4826
LEAST_CORRELATION = 0.5  # of the two dates over the pixels kept: below, the line means nothing


def sample(sources: Sequence[Source]) -> list[np.ndarray]:
    """Values (C, N) of each source (one grid) at the same cells, valid on all, evenly spread and always the same."""
    shape = sources[0].grid.shape
    size = tuple(min(SAMPLE_SIDE, n) for n in shape)
    counts = [min(SAMPLES_A_SIDE, -(-n // s)) for n, s in zip(shape, size, strict=True)]
    rows, cols = (np.linspace(0, n - s, c).astype(int) for n, s, c in zip(shape, size, counts, strict=True))
    found: list[list[np.ndarray]] = [[] for _ in sources]
    for start in sorted({(int(r), int(c)) for r in rows for c in cols}):
        images = [s.read(Window(start=start, size=size)) for s in sources]
        valid = np.logical_and.reduce([np.ones(size, bool) if i.valid is None else i.valid for i in images])
        for values, image in zip(found, images, strict=True):
            values.append(image.array[:, valid].astype(np.float64))
    return [np.concatenate(values, axis=1) for values in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Per band: `low` becomes 0 and `high` becomes 1, values outside are cut."""

    low: tuple[float, ...]
    high: tuple[float, ...]


def common_stretch(sources: Sequence[Source], percent: tuple[float, float] = (2.0, 98.0)) -> Stretch:
    """One stretch for all dates, from the percentiles of their pooled values. Raises InputError("empty_image")."""
    pooled = np.concatenate(sample(sources), axis=1)
    if not pooled.size:
        raise InputError("empty_image", "no cell is valid on all dates: nothing to look at")
    low, high = np.percentile(pooled, percent, axis=1)
    high = np.where(high > low, high, low + 1)
    return Stretch(low=tuple(map(float, low)), high=tuple(map(float, high)))


class StretchedSource:
    """A scene in 0..1 (float32) by a Stretch; invalid cells are 0."""

    def __init__(self, scene: Source, stretch: Stretch) -> None:
        self.scene, self.stretch = scene, stretch
        self.grid, self.channels, self.dtype = scene.grid, scene.channels, np.dtype("float32")

    def read(self, window: Window) -> Image:
        image = self.scene.read(window)
        low, high = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.stretch.low, self.stretch.high))
        array = np.clip((image.array.astype(np.float32) - low) / (high - low), 0, 1)
        if image.valid is not None:
            array = np.where(image.valid, array, np.float32(0))
        return Image(array, image.grid, image.channels, image.valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class BandFit:
    """after' = gain * after + offset; `kept` share of the sampled pixels taken as unchanged, their `correlation`."""

    band: str
    gain: float
    offset: float
    kept: float
    correlation: float
    used: bool


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """The fits of all bands, for the report."""

    bands: tuple[BandFit, ...]
    pixels: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def invariant_fit(before: Source, after: Source, *, seed: int = 0) -> Normalisation:
    """Gain and offset per band that bring `after` to `before` over unchanged pixels (both on one grid)."""
    first, second = sample([before, after])
    draw = np.random.default_rng(seed)
    fits = []
    for name, y, x in zip(before.channels, first, second, strict=True):
        gain, offset, keep = _fit(x, y, draw)
        same = x[keep].size > 2 and x[keep].std() > 0 and y[keep].std() > 0
        likeness = float(np.corrcoef(x[keep], y[keep])[0, 1]) if same else 0.0
        used = likeness >= LEAST_CORRELATION
        fits.append(
            BandFit(
                band=name,
                gain=gain if used else 1.0,
                offset=offset if used else 0.0,
                kept=float(keep.mean()) if keep.size else 0.0,
                correlation=likeness,
                used=used,
            )
        )
    return Normalisation(bands=tuple(fits), pixels=first.shape[1])


def _fit(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> tuple[float, float, np.ndarray]:
    """Gain, offset and the pixels kept of y = gain * x + offset."""
    keep = np.ones(x.size, dtype=bool)
    if x.size < 3:
        return 1.0, 0.0, keep
    a, b = draw.integers(0, x.size, (2, 20 * CANDIDATES))
    spread = SPREAD * float(np.median(np.abs(x - np.median(x))))  # of most pixels: change may be far brighter
    rising = (np.abs(x[a] - x[b]) > 0.5 * spread) & ((y[a] - y[b]) * (x[a] - x[b]) > 0)
    a, b = a[rising][:CANDIDATES], b[rising][:CANDIDATES]
    if not a.size:
        return 1.0, 0.0, keep
    gains = (y[a] - y[b]) / (x[a] - x[b])
    offsets = y[a] - gains * x[a]
    judges = draw.choice(x.size, min(JUDGES, x.size), replace=False)
    misses = [float(np.median(np.abs(y[judges] - g * x[judges] - o))) for g, o in zip(gains, offsets, strict=True)]
    best = int(np.argmin(misses))
    gain, offset = float(gains[best]), float(offsets[best])
    for _ in range(ROUNDS):
        off = np.abs(y - gain * x - offset)
        keep = off <= max(2 * SPREAD * float(np.median(off)), 1e-12 * float(np.abs(y).max() + 1))
        xs, ys = x[keep], y[keep]
        (xx, xy), (_, yy) = np.cov(xs, ys)
        if xy <= 0:
            break
        gain = float((yy - xx + np.sqrt((yy - xx) ** 2 + 4 * xy**2)) / (2 * xy))  # major axis: both dates are noisy
        offset = float(ys.mean() - gain * xs.mean())
    return gain, offset, keep


class NormalisedSource:
    """A scene (float32) under a Normalisation."""

    def __init__(self, scene: Scene, fit: Normalisation) -> None:
        self.scene, self.fit = scene, fit
        self.grid, self.channels, self.dtype = scene.grid, scene.channels, np.dtype("float32")
        self.units = scene.units
        told = "; ".join(f"{b.band}: gain {b.gain:.4g} offset {b.offset:.4g}" for b in fit.bands)
        self.notes = (*scene.notes, f"brought to the first date by unchanged pixels ({told})")

    def read(self, window: Window) -> Image:
        image = self.scene.read(window)
        gain, offset = (np.array([getattr(b, k) for b in self.fit.bands])[:, None, None] for k in ("gain", "offset"))
        return Image((image.array * gain + offset).astype(np.float32), image.grid, image.channels, image.valid)

    def close(self) -> None:
        """Lets the files go."""
        self.scene.close()
