"""Labels from scores: one class a voxel by arg-max; volumes and intensities per label on the file's own grid.

Settings (in the bundle): `labels` {"1": "grey matter", ...} network class -> name, `values` an optional map of
network class -> integer written (the user's own integers), `cleaning` an optional map of network class -> steps of
`pipelines.tasks.cleaning` done to the whole label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from medmamba.errors import ConfigError
from medmamba.preprocessing import slabs
from medmamba.source import Source
from pipelines.tasks.cleaning import CLEANING, clean

SUFFIX = "dseg"


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """`names` by network class (background 0 left out), `values` the integer written for each class, `cleaning` the
    steps for each written value that needs some."""

    domain: ClassVar[str] = "volumes"
    suffix: ClassVar[str] = SUFFIX
    names: Mapping[int, str]
    values: Mapping[int, int]
    cleaning: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Segmentation:
        """From a bundle's task entry. Raises ConfigError when labels are missing, two share a value, or a step of
        cleaning is unknown."""
        if not settings.get("labels"):
            raise ConfigError('task segmentation needs labels, for example {"1": "liver"}')
        names = {int(k): str(v) for k, v in settings["labels"].items()}
        values = {0: 0} | {k: k for k in names} | {int(k): int(v) for k, v in settings.get("values", {}).items()}
        if len(set(values.values())) != len(values):
            raise ConfigError(f"task segmentation: two classes share a written value in {values}")
        steps = {values[int(k)]: tuple(found) for k, found in settings.get("cleaning", {}).items()}
        if unknown := sorted({step for found in steps.values() for step in found} - set(CLEANING)):
            raise ConfigError(f"task segmentation: cleaning {unknown} unknown; known: {', '.join(CLEANING)}")
        return cls(names=names, values=values, cleaning=steps)

    @property
    def written_names(self) -> dict[int, str]:
        """Names by written value, background included."""
        return {0: "background"} | {self.values[k]: v for k, v in self.names.items()}

    @property
    def scored(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """What an evaluation scores: name and the written values it covers, by written value."""
        return {value: (name, (value,)) for value, name in self.written_names.items() if value}

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Scores (K, *space) -> written labels (1, *space); running maximum, first class wins a tie."""
        best, label = scores[0].copy(), np.zeros(scores.shape[1:], dtype=np.uint16)
        for k in range(1, len(scores)):
            better = scores[k] > best
            np.fmax(best, scores[k], out=best)
            np.maximum(label, better * np.uint16(k), out=label)  # k rises: the last one that was better
        return self.written(len(scores))[label][None]

    def written(self, classes: int) -> np.ndarray:
        """The integer written for each network class, in the smallest type that holds them all."""
        values = [self.values.get(k, k) for k in range(classes)]
        return np.array(values, dtype=np.result_type(*map(np.min_scalar_type, values)))

    def finish(self, labels: np.ndarray) -> np.ndarray:
        """What needs the whole case: written labels (*space), cleaned in place."""
        return clean(labels, self.cleaning) if self.cleaning else labels

    def summary(self, labels: np.ndarray, source: Source) -> dict[str, Any]:
        """Per written label: voxels, volume_ml, intensity mean/std (null where undefined), truncated at the border."""
        grid = source.grid
        ml = grid.cell_volume / 1000.0
        sums = {v: np.zeros(3) for v in self.written_names if v}
        for window in slabs(grid.shape):
            values = source.read(window).array[0].astype(np.float64)
            part = labels[window.slices]
            for value, total in sums.items():
                inside = values[part == value]
                inside = inside[np.isfinite(inside)]
                total += (inside.size, inside.sum(), (inside**2).sum())
        return {"labels": {str(v): self._row(v, labels, sums[v], ml) for v in sums}}

    def _row(self, value: int, labels: np.ndarray, sums: np.ndarray, ml: float) -> dict[str, Any]:
        voxels = int((labels == value).sum())
        n, total, squares = sums
        mean = float(total / n) if n else None
        std = float(np.sqrt(max(squares / n - (total / n) ** 2, 0.0))) if n else None
        return {
            "name": self.written_names[value],
            "voxels": voxels,
            "volume_ml": voxels * ml,
            "intensity_mean": mean,
            "intensity_std": std,
            "truncated": touches_border(labels, value),
        }


def touches_border(labels: np.ndarray, value: int) -> bool:
    """Whether a label has a voxel on any face of the image (then its volume is a lower bound)."""
    faces = [np.take(labels, end, axis=axis) for axis in range(labels.ndim) for end in (0, -1)]
    return any(bool((face == value).any()) for face in faces)
