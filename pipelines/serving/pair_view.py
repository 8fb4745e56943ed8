"""Two scenes made comparable: one grid, shift corrected, clouds and missing cells known, the later one brought to the
earlier one's radiometry. Training and production look through the same view.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo.align import Alignment, align, seen_on
from geo.coregister import Registration, coregister
from geo.formats import format_of, open_scene
from geo.quality import ClearSource, QualitySource
from geo.radiometry import NormalisedSource, invariant_fit
from geo.scene import Scene
from medmamba.errors import InputError
from medmamba.grid import Grid
from medmamba.preprocessing import Preprocessing
from medmamba.sample import Image
from medmamba.source import Source
from medmamba.windows import Window
from pipelines.tasks.change import Comparison

ROLES = ("before", "after")
STRIP = 4096  # columns of a scene made at a time: memory does not grow with its width


class LastRead:
    """A scene that remembers its last window: the contract takes its bands one by one."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.grid, self.channels, self.dtype = scene, scene.grid, scene.channels, scene.dtype
        self._last: tuple[Window, Image] | None = None
        self._lock = threading.Lock()

    def read(self, window: Window) -> Image:
        with self._lock:
            if self._last is None or self._last[0] != window:
                self._last = window, self.scene.read(window)
            return self._last[1]


@dataclass(frozen=True, kw_only=True)
class PairView:
    """`before` and `after` on one `grid`, clear cells valid; `qualities` of both; `record` is what was done."""

    before: Scene
    after: Scene
    qualities: tuple[QualitySource, QualitySource]
    grid: Grid
    record: dict[str, Any]
    notes: tuple[str, ...]

    def seen(self, contract: Preprocessing) -> Source:
        """What the network sees. Raises InputError("wrong_channels") unless both dates have the contract's bands."""
        require_bands(self.before, contract)
        return contract.forward({"before": LastRead(self.before), "after": LastRead(self.after)})

    def close(self) -> None:
        """Lets the files go."""
        self.before.close()
        self.after.close()


def require_bands(scene: Scene, contract: Preprocessing) -> None:
    """Raises InputError("wrong_channels") when a scene has not the bands that a bundle compares."""
    bands = 1 + max(c.volume or 0 for c in contract.channels)
    if len(scene.channels) != bands:
        raise InputError("wrong_channels", f"the scenes have bands {list(scene.channels)}, the bundle wants {bands}")


def aligned_pair(files: Mapping[str, Path], comparison: Comparison) -> Alignment:
    """The scenes of `files` (roles before, after) on one grid, nothing read. Raises InputError."""
    missing = [role for role in ROLES if role not in files]
    if missing:
        raise InputError("missing_channel", f"the bundle compares {list(ROLES)}, the case lacks {missing}")
    scenes = [open_scene(files[role]) for role in ROLES]
    return align(scenes, reference=comparison.reference, resampling=comparison.resampling)


def open_pair(files: Mapping[str, Path], comparison: Comparison) -> PairView:
    """The pair of `files` (roles before, after). Raises InputError for files, pairs and shifts that cannot be used."""
    aligned = aligned_pair(files, comparison)
    before, after = aligned.sources
    record: dict[str, Any] = {"alignment": aligned.record}
    shift = (0.0, 0.0)
    if comparison.register == "shift":
        after, registration = coregister(before, after)
        record["registration"] = registration.to_json()
        registration.require()
        shift = shift_of(registration)
    qualities = (
        quality_of(before, files["before"], aligned.grid),
        quality_of(after, files["after"], aligned.grid, shift),
    )
    record["clouds"] = {role: q.rule for role, q in zip(ROLES, qualities, strict=True)}
    clear: list[Scene] = [ClearSource(q) for q in qualities]
    if comparison.normalise == "invariant":
        fit = invariant_fit(*clear)
        record["normalisation"] = fit.to_json()
        clear[1] = NormalisedSource(clear[1], fit)
    notes = tuple(dict.fromkeys(note for scene in aligned.sources for note in scene.notes))
    return PairView(before=clear[0], after=clear[1], qualities=qualities, grid=aligned.grid, record=record, notes=notes)


def shift_of(registration: Registration) -> tuple[float, float]:
    """The shift that was corrected, in pixels (rows, cols)."""
    return registration.shift_px if registration.verdict == "applied" else (0.0, 0.0)


def quality_of(scene: Scene, path: Path, grid: Grid, shift_px: tuple[float, float] = (0.0, 0.0)) -> QualitySource:
    """What can be seen of a scene on `grid`: by its own cloud classes where the product has them."""
    classes = format_of(path).quality(path)
    on_grid = None if classes is None else seen_on(classes, grid, resampling="nearest", shift_px=shift_px)
    return QualitySource(scene, on_grid)
