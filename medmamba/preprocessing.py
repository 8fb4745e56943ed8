"""The contract with the data: what the network is shown, and how its scores come back onto the file's own grid.

The Preprocessing used in training is the object saved in the bundle: there is no second description.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import numpy as np

from medmamba.errors import ConfigError, InputError
from medmamba.grid import RAS, Grid
from medmamba.resample import ResampledSink, ResampledSource
from medmamba.sample import Image
from medmamba.source import PermutedSink, PermutedSource, SelectedSource, Sink, Source, StackedSource, ZeroSource
from medmamba.windows import Window, Windowing

LARGEST_INVALID_SHARE = 0.05  # more NaN or Inf than this and the case is refused as non_finite
QUANTILES = (0.01, 0.99)  # of an image, held against what the contract expects of its units
SAMPLE = 1_000_000  # values, evenly taken, that the quantiles are found from
SLAB_VOXELS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One input channel: its `role`, the `volume` of a 4D file (None: it must be 3D), clip in file units, scaling.

    scaling "fixed": (x - shift) / scale; "zscore": mean and standard deviation of the whole image (over values above
    `foreground_above` when given), found by one streaming pass before the first window. `low_between` and
    `high_between`: where the 1 % and 99 % quantiles of an image in the right units lie (Hounsfield, not 0..4095).
    """

    role: str
    volume: int | None = None
    clip: tuple[float, float] | None = None
    scaling: str = "zscore"
    shift: float = 0.0
    scale: float = 1.0
    foreground_above: float | None = None
    low_between: tuple[float, float] | None = None
    high_between: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("low_between", "high_between"):
            found = getattr(self, name)
            if found is not None and found[0] > found[1]:
                raise ConfigError(f"channel {self.role!r}: {name} {found} must rise")
        if self.scaling not in ("fixed", "zscore"):
            raise ConfigError(f"channel {self.role!r}: scaling {self.scaling!r} unknown; known: fixed, zscore")
        if self.scale == 0 or (self.clip is not None and self.clip[0] >= self.clip[1]):
            raise ConfigError(f"channel {self.role!r}: scale {self.scale} must not be 0 and clip {self.clip} must rise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Channels in order, orientation (closest canonical axes, or as stored), spacing (array order; None = the file's
    own), the windowing, and the axes over whose mirrorings scores are averaged (`mirror`, test-time augmentation).
    `modality_dropout`: the share of patches in which training hid a role; above 0 a case may lack roles, not all.
    `largest_upsampling` refuses files coarser than that factor (units mistaken)."""

    channels: tuple[Channel, ...]
    windowing: Windowing
    canonical: bool = True
    spacing: tuple[float, ...] | None = None
    mirror: tuple[int, ...] = ()
    modality_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.channels:
            raise ConfigError("a contract needs at least one channel")
        if not 0 <= self.modality_dropout < 1:
            raise ConfigError(f"modality_dropout {self.modality_dropout} is a share of patches: 0 up to, not with, 1")
        if not set(self.mirror) <= set(range(len(self.windowing.size))) or len(set(self.mirror)) < len(self.mirror):
            raise ConfigError(f"mirror {self.mirror}: axes of the window {self.windowing.size}, each once, from 0")
        if self.spacing is not None and (len(self.spacing) != len(self.windowing.size) or min(self.spacing) <= 0):
            raise ConfigError(
                f"spacing {self.spacing} must be positive, one number per axis of window {self.windowing.size}"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the files, each once, in order of the channels."""
        return tuple(dict.fromkeys(c.role for c in self.channels))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        fields: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in c.items()} for c in values["channels"]
        ]
        w = values["windowing"]
        windowing = Windowing(**{**w, "size": tuple(w["size"]), "overlap": tuple(w["overlap"])})
        spacing = tuple(values["spacing"]) if values.get("spacing") else None
        channels = tuple(Channel(**f) for f in fields)
        return cls(
            channels=channels,
            windowing=windowing,
            canonical=values["canonical"],
            spacing=spacing,
            mirror=tuple(values.get("mirror", ())),
            modality_dropout=values.get("modality_dropout", 0.0),
        )

    def shape_for(self, grid: Grid) -> tuple[int, ...]:
        """Cells of a (canonical) grid after resampling to the contract's spacing."""
        if self.spacing is None:
            return grid.shape
        scaled = [n * s / t for n, s, t in zip(grid.shape, grid.spacing, self.spacing, strict=True)]
        return tuple(max(1, round(v)) for v in scaled)

    def forward(self, sources: Mapping[str, Source], progress: Callable[[str], None] | None = None) -> Source:
        """What the network sees: stacked by role, reoriented, resampled, scaled. Lazy, but for per-image statistics.

        A role that may be missing is 0 everywhere."""
        present = self.present(sources)
        scaled: dict[Channel, Source] = {}
        first = sources[present[0]].grid
        for channel in (c for c in self.channels if c.role in present):
            source = sources[channel.role]
            if channel.volume is not None and channel.volume < len(source.channels):
                source = SelectedSource(source, channel.volume)
            if source.grid.rank != len(self.windowing.size) or len(source.channels) != 1:
                raise InputError(
                    "wrong_channels",
                    f"role {channel.role!r}: shape {source.grid.shape} with {len(source.channels)} channels; "
                    f"the bundle wants rank {len(self.windowing.size)} with 1 channel; one volume of a file is named "
                    "FILE/volume=0",
                )
            if not source.grid.matches(first):
                raise InputError(
                    "grid_mismatch",
                    f"role {channel.role!r} has shape {source.grid.shape} spacing {source.grid.spacing}, role "
                    f"{present[0]!r} {first.shape} {first.spacing}; resample the files of one case onto one grid",
                )
            scaled[channel] = self._channel(source, channel, first)
        seen = next(iter(scaled.values())).grid
        every = [scaled.get(channel) or ZeroSource(seen, channel.role) for channel in self.channels]
        return every[0] if len(every) == 1 else StackedSource(*every)

    def present(self, given: Collection[str]) -> tuple[str, ...]:
        """Roles of the contract that are among those `given`. Raises InputError("missing_channel") when one is missing
        that may not be."""
        present = tuple(role for role in self.roles if role in given)
        missing = [role for role in self.roles if role not in given]
        if missing and not (present and self.modality_dropout > 0):
            raise InputError("missing_channel", f"the bundle wants roles {list(self.roles)}, the case lacks {missing}")
        return present

    def _channel(self, source: Source, channel: Channel, grid: Grid) -> Source:
        order, flips = self.axes(grid)
        turned = PermutedSource(source, order, flips)
        scaled = ScaledSource(turned, channel)
        shape = self.shape_for(turned.grid)
        return scaled if shape == turned.grid.shape else ResampledSource(scaled, shape)

    def labels_forward(self, source: Source) -> Source:
        """The same geometry for a label image: nearest cell, values untouched."""
        turned = PermutedSource(source, *self.axes(source.grid))
        shape = self.shape_for(turned.grid)
        return turned if shape == turned.grid.shape else ResampledSource(turned, shape, order=0)

    def inverse(self, sink: Sink, grid: Grid) -> Sink:
        """A sink for scores on the network's grid that writes to `sink` on the file's own `grid`."""
        order, flips = self.axes(grid)
        turned = grid.permute(order, flips)
        own = PermutedSink(sink, turned.shape, order, flips)
        shape = self.shape_for(turned)
        return own if shape == turned.shape else ResampledSink(own, shape, turned.shape)

    def axes(self, grid: Grid) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Order and flips that bring a grid's axes closest to canonical (z, y, x rising); as stored when not wanted."""
        if not self.canonical or grid.frame != RAS:
            return tuple(range(grid.rank)), (False,) * grid.rank
        return canonical_axes(grid)


def canonical_axes(grid: Grid) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Order and flips to (z, y, x) with rising world coordinates: the assignment with the largest direction cosines."""
    cosines = grid.affine[:-1, :-1] / np.array(grid.spacing)
    worlds = range(grid.rank - 1, -1, -1)
    order = max(permutations(range(grid.rank)), key=lambda axes: sum(abs(cosines[w, a]) for w, a in zip(worlds, axes)))
    return order, tuple(bool(cosines[w, a] < 0) for w, a in zip(worlds, order))


class ScaledSource:
    """A one-channel source clipped and scaled by the contract; non-finite and invalid cells become 0 and not valid."""

    def __init__(self, source: Source, channel: Channel) -> None:
        self.source, self.channel = source, channel
        self.grid, self.channels, self.dtype = source.grid, (channel.role,), np.dtype("float32")
        self.shift, self.scale = channel.shift, channel.scale
        checked = channel.low_between or channel.high_between or source.dtype.kind == "f"
        if channel.scaling == "zscore":
            self.shift, self.scale = image_statistics(source, channel)
        elif checked:  # integers in units that nobody doubts need no pass
            image_statistics(source, channel)

    def read(self, window: Window) -> Image:
        image = self.source.read(window)
        array, valid = clipped(image, self.channel)
        array = (array - np.float32(self.shift)) / np.float32(self.scale)
        if not valid.all():
            array = np.where(valid, array, np.float32(0))
        return Image(array, image.grid, self.channels, valid)


def clipped(image: Image, channel: Channel) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 after the clip, and where they may be used (valid and finite)."""
    array = image.array.astype(np.float32)
    valid = np.isfinite(array[0])
    if image.valid is not None:
        valid &= image.valid
    if channel.clip is not None:
        array = np.clip(array, *channel.clip)
    return array, valid


def image_statistics(source: Source, channel: Channel) -> tuple[float, float]:
    """Mean and standard deviation over the image in one pass of slabs (float64, merged by Chan's formula).

    Raises InputError("non_finite") when too many values are unusable, ("empty_image") when none differs,
    ("wrong_units") when a quantile lies outside of what the contract expects.
    """
    count, mean, m2, bad, total = 0, 0.0, 0.0, 0, 0
    sample: list[np.ndarray] = []
    step = max(1, int(np.prod(source.grid.shape)) // SAMPLE)
    for window in slabs(source.grid.shape):
        image = source.read(window)
        array, valid = clipped(image, channel)
        seen = valid.size if image.valid is None else int(image.valid.sum())
        total, bad = total + seen, bad + seen - int(valid.sum())
        if channel.low_between or channel.high_between:
            sample.append(image.array[0][valid][::step].astype(np.float64))
        if channel.foreground_above is not None:
            valid = valid & (array[0] > channel.foreground_above)
        values = array[0][valid].astype(np.float64)
        if values.size:
            n, slab_mean = values.size, float(values.mean())
            delta = slab_mean - mean
            m2 += float(((values - slab_mean) ** 2).sum()) + delta**2 * count * n / (count + n)
            mean += delta * n / (count + n)
            count += n
    if bad > LARGEST_INVALID_SHARE * total:
        raise InputError(
            "non_finite", f"role {channel.role!r}: {bad} of {total} values are NaN or infinite; at most 5 % may be"
        )
    if count == 0 or m2 <= 0:
        raise InputError("empty_image", f"role {channel.role!r}: no value differs from another; nothing to segment")
    if sample:
        require_units(np.concatenate(sample), channel)
    return mean, float(np.sqrt(m2 / count))


def require_units(sample: np.ndarray, channel: Channel) -> None:
    """Raises InputError("wrong_units") when a quantile lies where no image of the training cohort had it."""
    for q, bounds in zip(QUANTILES, (channel.low_between, channel.high_between), strict=True):
        if bounds is not None and sample.size and not bounds[0] <= (value := np.quantile(sample, q)) <= bounds[1]:
            raise InputError(
                "wrong_units",
                f"role {channel.role!r}: {q:.0%} of the values lie below {value:.4g}, expected between {bounds[0]:g} "
                f"and {bounds[1]:g}; are these the units of the training images (for CT Hounsfield)?",
            )


def slabs(shape: tuple[int, ...]) -> list[Window]:
    """Whole planes of axis 0 in pieces of about SLAB_VOXELS cells."""
    rows = max(1, SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    return [
        Window(start=(r, *(0 for _ in shape[1:])), size=(min(rows, shape[0] - r), *shape[1:]))
        for r in range(0, shape[0], rows)
    ]
