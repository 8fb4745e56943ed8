"""One case of a batch, come what may: attempt, memory, predict; or a record that says why it stands aside."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from medmamba.files import write_bytes
from pipelines.cases.archive import Item, input_facts, set_aside_path
from pipelines.cases.state import DEATHS, begin_attempt, end_attempt, read_attempt
from pipelines.domains import domain_of, predict
from pipelines.report import Report, machine, now
from pipelines.serving.budget import require_memory
from pipelines.serving.predict import Predictor

TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ENFILE,
    errno.EMFILE,
    errno.ECONNRESET,
}
FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What every case of a batch shares: the predictor, the output folder, bytes of memory one case may take."""

    predictor: Predictor
    output: Path
    memory: int

    @property
    def bundle(self) -> Bundle:
        return self.predictor.bundle


def process_case(
    place: Workplace, item: Item, *, last: bool = True, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Runs one due case and returns its report, done or set aside; whatever was set aside before is forgotten.

    With `last` false an OSError that may pass (a disk or network that stutters) is raised instead of recorded, so that
    the caller can try again. A case whose process died twice is not started a third time.
    """
    output, title, case = place.output, place.bundle.title, item.case.id
    before = read_attempt(output, title, case)
    if before is not None and before.key == item.key and before.count >= DEATHS:
        died = InputError(
            "killed",
            f"case {case}: the process died {before.count} times on it, last started {before.started}; look for a lack "
            "of memory in the system's log, then --retry killed",
        )
        report = set_aside(place, item, died)
        end_attempt(output, title, case)
        return report
    try:
        return _try(place, item, last, progress)
    finally:  # an error or an interrupt from the keyboard is no death
        end_attempt(output, title, case)


def _try(place: Workplace, item: Item, last: bool, progress: Callable[[int, int], None] | None) -> Report:
    """Predicts, or turns what went wrong into a record."""
    try:
        begin_attempt(place.output, place.bundle.title, item.case.id, item.key)
        if item.fault is not None:
            raise item.fault
        needed = domain_of(place.bundle.task).needed_bytes(place.bundle, item.case, place.predictor.mode)
        require_memory(item.case, needed, place.memory)
        report = predict(place.predictor, item.case, place.output, progress)
    except InputError as error:
        return set_aside(place, item, error)
    except OSError as error:
        if error.errno in FULL:
            return set_aside(place, item, InputError("no_space", f"{place.output}: {error.strerror}; free some disk"))
        if error.errno in TRANSIENT and not last:
            raise
        return set_aside(place, item, error)
    except Exception as error:
        return set_aside(place, item, error)
    clear_record(place.output, place.bundle, item.case.id)
    return report


def set_aside(place: Workplace, item: Item, error: BaseException) -> Report:
    """Writes why a case stands aside: under its code, or as `internal_error` with the traceback in a log beside it.

    When not even that can be written (a full disk) the report is returned all the same; the case is then due again.
    """
    path = set_aside_path(place.output, place.bundle, item.case.id)
    log = path.with_suffix(".log")
    if isinstance(error, InputError):
        code, message = error.code, str(error)
    else:
        code, message = "internal_error", f"{type(error).__name__}: {error}; traceback in {log}"
    report = Report(
        case=item.case.id,
        key=item.key,
        status="set_aside",
        bundle={"name": place.bundle.name, "id": place.bundle.id},
        inputs=input_facts(item, domain_of(place.bundle.task).parts),
        code=code,
        message=message.encode("utf-8", "backslashreplace").decode(),
        group=item.case.group,
        run={**place.predictor.run, **machine(), "started": now()},
    )
    with suppress(OSError):
        if isinstance(error, InputError):
            log.unlink(missing_ok=True)
        else:
            write_bytes(log, "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace"))
        report.save(path)
    return report


def clear_record(output: Path, bundle: Bundle, case: str) -> None:
    """A finished case stands aside no more."""
    path = set_aside_path(output, bundle, case)
    path.with_suffix(".log").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
