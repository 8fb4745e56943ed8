"""The nightly batch: which cases are due, each of them run whatever happens to the others, and what came out told.

The order of things only; what a case is and does lies in `pipelines`. Heavy rooms are imported when they are needed, so
that a night with nothing new starts neither Prefect nor MLflow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.progress import progress
from flows.settings import prepare_environment
from flows.work import Work
from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, MedMambaError
from pipelines.cases.archive import Found, Plan, due, require_apart, require_code
from pipelines.cases.state import STATE, Index, end_attempt, lock, sweep
from pipelines.domains import domain_of, needed_bytes, scratch_bytes
from pipelines.layouts.bids import describe
from pipelines.pages.report import PAGE, write_report
from pipelines.report import Report, now, peak_memory_mb
from pipelines.serving.budget import fitting_batch, machine_bytes, memory_line, parse_bytes
from pipelines.serving.dicom_out import require_seg_kind
from pipelines.serving.predict import Predictor, require_mode
from pipelines.serving.process import Workplace, clear_record
from pipelines.tasks import build_task
from pipelines.tracking import Resolved, end_run, log_reports, pseudonym_key, resolve, stamp, start_run, untracked

if TYPE_CHECKING:
    from pipelines.tracking import Run

WELL, BROKEN, ASIDE = 0, 1, 3
PAGE_CASES = 500  # with more the page holds this run's cases alone
SHARE_OF_MACHINE = 0.9  # of the memory, when --ram is not given

Echo = Callable[[str], None]
Runner = Callable[[Work, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command was asked; names as its flags."""

    input: Path
    bundle: str
    output: Path
    ram: str | None = None
    device: str = "auto"
    batch: int = 0  # windows at once; 0: what fits the memory
    workers: int = 1
    retry: str | None = None
    verify: bool = False
    reprocess: bool = False
    settle: float = 60.0
    follow: bool = False
    dicom_seg: str = "labelmap"
    mode: str = "windows"

    def __post_init__(self) -> None:
        if self.workers < 1 or self.batch < 0 or self.settle < 0:
            raise ConfigError(
                f"--workers {self.workers}: at least 1; --batch {self.batch}, --settle {self.settle}: at least 0"
            )
        require_code(self.retry)
        require_seg_kind(self.dicom_seg)
        require_mode(self.mode)
        if self.ram is not None:
            parse_bytes(self.ram)

    @property
    def memory(self) -> int:
        """Bytes that one case may take: the budget divided among the workers."""
        whole = int(machine_bytes() * SHARE_OF_MACHINE) if self.ram is None else parse_bytes(self.ram)
        return whole // self.workers


def run_batch(*, echo: Echo, runner: Runner | None = None, **asked: Any) -> int:
    """Runs a batch with `Settings(**asked)` and returns the exit code: 0 all well, 1 broken set-up, 3 while a case of
    this input stands set aside. Says everything through `echo`; on a terminal a progress bar goes to stderr.

    `runner(work, workers)` runs the due cases; by default under Prefect.
    """
    prepare_environment()
    from flows.orchestrate import run_in_flow

    try:
        settings = Settings(**asked)
        require_apart(settings.input, settings.output)
        resolved = resolve(settings.bundle, settings.output / STATE / "models")
        with lock(settings.output), Index(settings.output) as index:
            return _run(settings, resolved, index, runner or run_in_flow, echo)
    except MedMambaError as error:
        echo(f"error: {error}")
        return BROKEN


def _run(settings: Settings, resolved: Resolved, index: Index, runner: Runner, echo: Echo) -> int:
    began, bundle = time.monotonic(), resolved.bundle
    sweep(settings.output)
    found, plan = look(settings, bundle, index)
    echo(told(found, plan, settings))
    folder = settings.output / bundle.title
    fresh, run, missing = [], None, 0
    if plan.due:
        echo(memory_told(plan, bundle, settings))
        run = _begin_tracking(settings, resolved, echo)
        work = prepare(settings, resolved, plan, run)
        with progress("cases") as update:
            told_of = count(1)
            work.tell = lambda _: update(next(told_of), len(plan.due))
            runner(work, settings.workers)
        fresh, missing = list(work.reports.values()), len(plan.due) - len(work.reports)
    reports = [i.report for i in (*plan.done, *plan.set_aside) if i.report] + fresh
    new = untracked(index, bundle.title, reports)
    if new and not plan.due:  # an earlier night could not log them
        run = _begin_tracking(settings, resolved, echo)
    if run is not None:
        _track(run, new, bundle.title, settings, index, echo)
    aside = sorted((r for r in reports if r.status == "set_aside"), key=lambda r: r.case)
    if fresh or (reports and not _page_stands(folder)):
        shown = reports if len(reports) <= PAGE_CASES else fresh or reports[-PAGE_CASES:]
        done = sorted((r for r in shown if r.status == "done"), key=lambda r: r.case)
        task = build_task(bundle.task)
        if task.domain == "volumes":
            describe(folder, bundle=bundle.title, source=settings.input, names=task.written_names)
        page = write_report(folder, done, [r for r in aside if r in shown], bundle.title)
        good = sum(r.status == "done" for r in fresh)
        spent = f"{time.monotonic() - began:.0f} s, memory at most {peak_memory_mb():.0f} MiB"
        echo(f"{good} done, {len(fresh) - good} set aside in {spent}; page: {page}")
    if aside:
        by_code = ", ".join(f"{code} {n}" for code, n in sorted(Counter(r.code for r in aside).items(), key=str))
        echo(f"set aside: {by_code}; records in {folder / 'set_aside'}; --retry CODE tries them again")
    if missing:
        echo(f"error: {missing} cases were not run; see the messages above. The next run takes them up")
        return BROKEN
    return ASIDE if aside else WELL


def _page_stands(folder: Path) -> bool:
    """Whether the page was written after every report: a run may have been killed between the two."""
    page = folder / PAGE
    return page.exists() and all(r.stat().st_mtime_ns <= page.stat().st_mtime_ns for r in folder.rglob("*.json"))


def look(settings: Settings, bundle: Bundle, index: Index) -> tuple[Found, Plan]:
    """What there is and what of it is due; forgets what a process that died left behind it."""
    roles = bundle.preprocessing.roles
    domain = domain_of(bundle.task)
    found = domain.find(settings.input, roles, output=settings.output, settle=settings.settle, follow=settings.follow)
    with progress("reading the archive") as update:
        plan = due(
            found.cases,
            bundle,
            settings.output,
            index=index,
            retry=settings.retry,
            verify=settings.verify,
            reprocess=settings.reprocess,
            mode=settings.mode,
            parts=domain.parts,
            progress=update,
        )
    for item in (*plan.done, *plan.set_aside):
        end_attempt(settings.output, bundle.title, item.case.id)
    for item in plan.done:
        clear_record(settings.output, bundle, item.case.id)
    return found, plan


def memory_told(plan: Plan, bundle: Bundle, settings: Settings) -> str:
    """What the largest of the due cases (of the first PAGE_CASES) will take, and what it may."""
    cases = [item.case for item in plan.due[:PAGE_CASES]]
    needed, scratch = (of(bundle, cases, settings.mode) for of in (needed_bytes, scratch_bytes))
    batch = batch_of(plan, bundle, settings)
    return memory_line(bundle, needed, scratch, settings.mode, batch, settings.memory)


def batch_of(plan: Plan, bundle: Bundle, settings: Settings) -> int:
    """Windows at once: as asked, or what fits the memory of the largest case."""
    cases = [item.case for item in plan.due[:PAGE_CASES]]
    return settings.batch or fitting_batch(bundle, needed_bytes(bundle, cases, settings.mode), settings.memory)


def told(found: Found, plan: Plan, settings: Settings) -> str:
    """The line before the work."""
    parts = [f"{len(plan.due)} due" if plan.due else "nothing due", f"{len(plan.done)} done before"]
    if plan.set_aside:
        parts.append(f"{len(plan.set_aside)} set aside before")
    if plan.outdated:
        parts.append(f"{len(plan.outdated)} outdated (finished with an older bundle; --reprocess redoes them)")
    if found.waiting:
        parts.append(f"{found.waiting} changed in the last {settings.settle:g} s wait for the next run (--settle)")
    return f"{len(found.cases) + found.waiting} cases: " + "; ".join([", ".join(parts), *found.notes])


def prepare(settings: Settings, resolved: Resolved, plan: Plan, run: Run | None) -> Work:
    """The network built and everything the cases share. Raises ConfigError for a device that is not there."""
    notes = {
        "mlflow_run": run.id if run else None,
        "model": resolved.model,
        "model_version": resolved.version,
        "workers": settings.workers,
        "batch_started": now(),
    }
    try:
        predictor = Predictor.load(
            resolved.bundle,
            device=settings.device,
            batch=batch_of(plan, resolved.bundle, settings),
            mode=settings.mode,
            run=notes,
            dicom_seg=settings.dicom_seg,
        )
        predictor.network.to(predictor.device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).partition("\n")[0]
        raise ConfigError(f"--device {settings.device}: {line}; `medmamba doctor` lists the devices") from None
    return Work(place=Workplace(predictor=predictor, output=settings.output, memory=settings.memory), items=plan.due)


def _begin_tracking(settings: Settings, resolved: Resolved, echo: Echo) -> Run | None:
    asked = {
        n: getattr(settings, n) for n in ("device", "batch", "mode", "workers", "ram", "retry", "verify", "reprocess")
    }
    if resolved.model:
        asked |= {"model": resolved.model, "model_version": resolved.version}
    try:
        return start_run(resolved.bundle, asked)
    except Exception as error:
        echo(f"warning: MLflow {_line(error)}; the figures lie in the reports, the next run logs them")
        return None


def _track(run: Run, new: Sequence[Report], title: str, settings: Settings, index: Index, echo: Echo) -> None:
    """Logs the reports that no run has logged yet; a failure of MLflow is told and nothing else."""
    try:
        log_reports(run, new, pseudonym_key(settings.output))
        end_run(run)
        index.set_tracked(title, {r.case: stamp(r) for r in new})
    except Exception as error:
        echo(f"warning: MLflow {_line(error)}; the figures lie in the reports, the next run logs them")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
