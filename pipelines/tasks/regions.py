"""Labels that overlap: a score a region, each by itself (sigmoid), written one over the other (nnU-Net's region-based
training: whole tumour, core, enhancing).

Settings (in the bundle): those of segmentation, where `labels` and `values` name what is written, and `regions`, a list
in the order of the scores: {"name": "core", "values": [2, 3], "written": 2}. A region is written over those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmamba.errors import ConfigError
from pipelines.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True)
class Region:
    """`values` of the label files that it covers, and the one `written` where it is found."""

    name: str
    values: tuple[int, ...]
    written: int


@dataclass(frozen=True, kw_only=True)
class Regions(Segmentation):
    """Segmentation by `regions`, one for each score."""

    regions: tuple[Region, ...]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Regions:
        """Raises ConfigError as segmentation does, and without regions."""
        plain = Segmentation.from_settings(settings)
        regions = tuple(
            Region(name=str(r["name"]), values=tuple(map(int, r["values"])), written=int(r["written"]))
            for r in settings.get("regions", ())
        )
        if not regions:
            raise ConfigError(
                'task regions needs regions, for example [{"name": "core", "values": [2, 3], "written": 2}]'
            )
        return cls(names=plain.names, values=plain.values, cleaning=plain.cleaning, regions=regions)

    @property
    def scored(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """Name and covered values of every region, by the value it writes."""
        return {region.written: (region.name, region.values) for region in self.regions}

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Scores (R, *space) -> written labels (1, *space): a region where its score is above 0, the last one wins."""
        values = self.written(len(scores))
        labels = np.zeros(scores.shape[1:], values.dtype)
        for score, value in zip(scores, values, strict=True):
            np.copyto(labels, value, where=score > 0)
        return labels[None]

    def written(self, classes: int) -> np.ndarray:
        """The integer written for each region, in the smallest type that holds them all."""
        values = [region.written for region in self.regions[:classes]]
        return np.array(values, dtype=np.result_type(*map(np.min_scalar_type, values)))
