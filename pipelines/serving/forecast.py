"""A batch told before it runs: cases, memory, time and disk, and what will be refused and why; no weights are loaded.

Headers are opened, no cell is read: what only cells can tell (damage, NaN, a shift between dates) is not foreseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from pipelines.cases.case import Case
from pipelines.domains import domain_of
from pipelines.report import Report


@dataclass(frozen=True, kw_only=True)
class CaseForecast:
    """One case: cells of its grid, bytes that `predict` will hold and that its products take on disk at most, `scratch`
    of a streamed one while it runs; or the code and words of its refusal."""

    case: str
    voxels: int = 0
    memory: int = 0
    disk: int = 0
    scratch: int = 0
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

    @property
    def scratch(self) -> int:
        """Bytes of disk that a streamed case takes while it runs, at most."""
        return max((c.scratch for c in self.cases), default=0)


def forecast(
    cases: Sequence[Case],
    bundle: Bundle,
    output: Path,
    *,
    memory: int,
    mode: str = "windows",
    progress: Callable[[int, int], None] | None = None,
) -> Forecast:
    """What a batch over `cases` in this mode of inference, with `memory` bytes for each, would meet."""
    told = []
    for number, case in enumerate(cases, start=1):
        told.append(case_forecast(case, bundle, memory, mode))
        if progress:
            progress(number, len(cases))
    voxels = sum(c.voxels for c in told if not c.code)
    past = per_voxel(bundle, output)
    if past is None:
        return Forecast(cases=tuple(told), disk=sum(c.disk for c in told))
    return Forecast(cases=tuple(told), disk=round(past[1] * voxels), seconds=past[0] * voxels)


def case_forecast(case: Case, bundle: Bundle, memory: int, mode: str = "windows") -> CaseForecast:
    """One case from its headers."""
    domain = domain_of(bundle.task)
    try:
        voxels, disk = domain.headers(bundle, case)
        needed = domain.needed_bytes(bundle, case, mode)
        scratch = domain.scratch_bytes(bundle, case, mode)
        if needed > memory:
            raise InputError("too_large", f"needs about {needed >> 20} MiB, {memory >> 20} MiB may be used")
    except InputError as error:
        return CaseForecast(case=case.id, code=error.code, message=str(error))
    except OSError as error:
        return CaseForecast(case=case.id, code="permission", message=str(error))
    return CaseForecast(case=case.id, voxels=voxels, memory=needed, disk=disk, scratch=scratch)


def per_voxel(bundle: Bundle, output: Path) -> tuple[float, float] | None:
    """Seconds and bytes of products a voxel: medians over this bundle's finished reports there; None without any."""
    reports = (Report.load(path) for path in (output / bundle.title).rglob("*.json"))
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
        *([f"scratch: {told.scratch / 2**20:.1f} MiB of disk while the largest case runs"] if told.scratch else []),
        *(f"  {c.case}: {c.code}: {c.message}" for c in told.refused),
    ]
