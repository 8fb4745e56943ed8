"""What a cohort looks like: sizes, spacings and intensities of every case, from one pass over its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmamba.preprocessing import QUANTILES, canonical_axes, slabs
from medmamba.source import PermutedSource
from pipelines.cases.cohort import LabelledCase
from pipelines.cases.formats import open_source

SAMPLE = 10_000  # values kept of a case and role, evenly taken: enough for a percentile of the whole cohort


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """One case: `shape` and `spacing_mm` with canonical axes (z, y, x), voxels of each label value, and by role the
    QUANTILES of the whole image and a sample of the values under a label (of all values where there is none)."""

    case: str
    group: str
    site: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    voxels: Mapping[int, int]
    quantiles: Mapping[str, tuple[float, float]]
    foreground: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RoleFacts:
    """Intensities of one role over the cohort: of the foreground, and where the QUANTILES of the images lie."""

    percentile_00_5: float
    median: float
    percentile_99_5: float
    mean: float
    std: float
    low: tuple[float, float]
    high: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Every case, and the intensities of every role."""

    cases: tuple[CaseFacts, ...]
    roles: Mapping[str, RoleFacts]

    @property
    def spacings(self) -> np.ndarray:
        """(cases, axes), mm."""
        return np.array([c.spacing_mm for c in self.cases])

    @property
    def shapes(self) -> np.ndarray:
        """(cases, axes), cells."""
        return np.array([c.shape for c in self.cases])

    def to_json(self) -> dict[str, Any]:
        kept = ("case", "group", "site", "shape", "spacing_mm", "voxels")
        cases = [{k: getattr(c, k) for k in kept} for c in self.cases]
        return {"cases": cases, "roles": {role: asdict(facts) for role, facts in self.roles.items()}}


def fingerprint(cases: Sequence[LabelledCase], progress: Callable[[int, int], None] | None = None) -> Fingerprint:
    """Reads every case once, slab by slab."""
    facts = []
    for number, case in enumerate(cases, start=1):
        facts.append(case_facts(case))
        if progress:
            progress(number, len(cases))
    roles = list(dict.fromkeys(role for f in facts for role in f.quantiles))
    return Fingerprint(cases=tuple(facts), roles={role: _role(role, facts) for role in roles})


def case_facts(labelled: LabelledCase) -> CaseFacts:
    """Facts of one case from its files."""
    truth = open_source(labelled.label)
    axes = canonical_axes(truth.grid)
    turned = PermutedSource(truth, *axes)
    images = {role: PermutedSource(open_source(path), *axes) for role, path in labelled.case.files.items()}
    voxels: dict[int, int] = {}
    everywhere: dict[str, list[np.ndarray]] = {role: [] for role in images}
    inside: dict[str, list[np.ndarray]] = {role: [] for role in images}
    for window in slabs(turned.grid.shape):
        labels = turned.read(window).array[0]
        for value, count in zip(*np.unique(labels, return_counts=True), strict=True):
            voxels[int(value)] = voxels.get(int(value), 0) + int(count)
        for role, image in images.items():
            values = image.read(window).array[0]
            everywhere[role].append(_thinned(values[np.isfinite(values)]))
            inside[role].append(_thinned(values[(labels > 0) & np.isfinite(values)]))
    truth.close()
    return CaseFacts(
        case=labelled.case.id,
        group=labelled.case.group,
        site=labelled.site,
        shape=turned.grid.shape,
        spacing_mm=turned.grid.spacing,
        voxels=dict(sorted(voxels.items())),
        quantiles={r: _quantiles(np.concatenate(v)) for r, v in everywhere.items()},
        foreground={r: _thinned(np.concatenate(inside[r])) for r in images},
    )


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most SAMPLE of the values, evenly taken."""
    return values[np.linspace(0, values.size - 1, min(SAMPLE, values.size)).astype(np.int64)].astype(np.float64)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, QUANTILES)
    return float(low), float(high)


def _role(role: str, facts: Sequence[CaseFacts]) -> RoleFacts:
    samples = np.concatenate([f.foreground[role] for f in facts if role in f.foreground])
    samples = samples if samples.size else np.zeros(1)
    low, median, high = (float(v) for v in np.percentile(samples, (0.5, 50, 99.5)))
    lows, highs = zip(*(f.quantiles[role] for f in facts if role in f.quantiles), strict=True)
    return RoleFacts(
        percentile_00_5=low,
        median=median,
        percentile_99_5=high,
        mean=float(samples.mean()),
        std=float(samples.std()),
        low=(min(lows), max(lows)),
        high=(min(highs), max(highs)),
    )
