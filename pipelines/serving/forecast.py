"""A batch told before it runs: cases, memory, time and disk, and what will be refused and why; no weights are loaded.

Headers are opened, no voxel is read: what only voxels can tell (damage, NaN, units) is not foreseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source
from pipelines.report import Report
from pipelines.serving.budget import predicted_bytes

AT_MOST = 6.0  # bytes a voxel of products on disk, as `predict` asks for before it starts a case


@dataclass(frozen=True, kw_only=True)
class CaseForecast:
    """One case: cells of its grid, bytes that `predict` will hold, or the code and words of its refusal."""

    case: str
    voxels: int = 0
    memory: int = 0
    code: str | None = None
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All cases; `seconds` None when no earlier report of this bundle tells how fast it is, `disk` then a bound."""

    cases: tuple[CaseForecast, ...]
    disk: int
    seconds: float | None = None

    @property
    def refused(self) -> tuple[CaseForecast, ...]:
        return tuple(c for c in self.cases if c.code)

    @property
    def peak(self) -> int:
        """Bytes of the largest case."""
        return max((c.memory for c in self.cases), default=0)


def forecast(
    cases: Sequence[Case],
    bundle: Bundle,
    output: Path,
    *,
    memory: int,
    progress: Callable[[int, int], None] | None = None,
) -> Forecast:
    """What a batch over `cases` with `memory` bytes for each would meet."""
    told = []
    for number, case in enumerate(cases, start=1):
        told.append(case_forecast(case, bundle, memory))
        if progress:
            progress(number, len(cases))
    voxels = sum(c.voxels for c in told if not c.code)
    past = per_voxel(bundle, output)
    if past is None:
        return Forecast(cases=tuple(told), disk=round(voxels * AT_MOST))
    return Forecast(cases=tuple(told), disk=round(past[1] * voxels), seconds=past[0] * voxels)


def case_forecast(case: Case, bundle: Bundle, memory: int) -> CaseForecast:
    """One case from its headers."""
    contract = bundle.preprocessing
    try:
        present = contract.present(case.files)
        sources = {role: open_source(case.files[role]) for role in present}
        first = sources[present[0]].grid
        for channel in (c for c in contract.channels if c.role in present):
            source = sources[channel.role]
            if channel.volume is None and len(source.channels) != 1:
                raise InputError("wrong_channels", f"{source.path}: {len(source.channels)} channels, 1 is wanted")
            if not source.grid.matches(first):
                raise InputError("grid_mismatch", f"{source.path}: another grid than role {present[0]!r}")
        needed = predicted_bytes(bundle, case)
        if needed > memory:
            raise InputError("too_large", f"needs about {needed >> 20} MiB, {memory >> 20} MiB may be used")
    except InputError as error:
        return CaseForecast(case=case.id, code=error.code, message=str(error))
    except OSError as error:
        return CaseForecast(case=case.id, code="permission", message=str(error))
    return CaseForecast(case=case.id, voxels=int(np.prod(first.shape, dtype=object)), memory=needed)


def per_voxel(bundle: Bundle, output: Path) -> tuple[float, float] | None:
    """Seconds and bytes of products a voxel: medians over this bundle's finished reports there; None without any."""
    reports = (Report.load(path) for path in (output / bundle.title).glob("*_dseg.json"))
    past = [
        (
            float(r.run["seconds"]) / int(np.prod(r.grid["shape"], dtype=object)),
            sum(facts["size"] for facts in r.outputs.values()) / int(np.prod(r.grid["shape"], dtype=object)),
        )
        for r in reports
        if r and r.status == "done" and r.run.get("seconds") and r.grid.get("shape")
    ]
    if not past:
        return None
    seconds, size = np.median(past, axis=0)
    return float(seconds), float(size)


def describe(told: Forecast) -> list[str]:
    """The forecast in lines for a person."""
    good = len(told.cases) - len(told.refused)
    known = told.seconds is not None
    time = f"about {told.seconds:.0f} s" if known else "unknown (no case was finished with this bundle there)"
    return [
        f"{len(told.cases)} cases: {good} can run, {len(told.refused)} will be refused",
        f"memory: {told.peak / 2**20:.0f} MiB of arrays for the largest case, the network's own beside it",
        f"disk: {'about' if known else 'at most'} {told.disk / 2**20:.1f} MiB; time: {time}",
        *(f"  {c.case}: {c.code}: {c.message}" for c in told.refused),
    ]
