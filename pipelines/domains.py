"""Kinds of cases, and what differs between them outside of the loops: found, hashed, predicted, told.

A task names its domain; nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from pipelines.cases.case import Case
from pipelines.report import Report
from pipelines.tasks import task_class

if TYPE_CHECKING:
    from pipelines.serving.predict import Predictor

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """`find` the cases of an input, `cases_of` the files of one; `parts` all files behind a path; `predict` one case;
    `headers` its cells and bytes of products; `needed_bytes` in memory and `scratch_bytes` on the disk by the mode of
    inference; `lines` of a report for the terminal."""

    find: Callable[..., Any]
    cases_of: Callable[..., list[Case]]
    parts: Callable[[Path], tuple[Path, ...]]
    predict: Callable[[Predictor, Case, Path, Progress | None], Report]
    headers: Callable[[Bundle, Case], tuple[int, int]]
    needed_bytes: Callable[[Bundle, Case, str], int]
    scratch_bytes: Callable[[Bundle, Case, str], int]
    lines: Callable[[Report], list[str]]


@cache
def volumes() -> Domain:
    """Volumes and planes of medicine."""
    from pipelines.cases import archive, formats
    from pipelines.serving import budget, headers, predict

    return Domain(
        find=archive.find,
        cases_of=archive.cases_of,
        parts=formats.parts_of,
        predict=predict.predict,
        headers=headers.headers,
        needed_bytes=budget.predicted_bytes,
        scratch_bytes=budget.predicted_scratch,
        lines=predict.lines_of,
    )


@cache
def pairs() -> Domain:
    """Two scenes of one place."""
    from pipelines.cases import pair_archive
    from pipelines.serving.predict_pair import headers, lines_of, predict_pair

    return Domain(
        find=pair_archive.find,
        cases_of=pair_archive.cases_of,
        parts=pair_archive.parts_of,
        predict=predict_pair,
        headers=headers,
        needed_bytes=pair_archive.predicted_bytes,
        scratch_bytes=pair_archive.predicted_scratch,
        lines=lines_of,
    )


DOMAINS: dict[str, Callable[[], Domain]] = {"volumes": volumes, "pairs": pairs}


def domain_of(task: Mapping[str, Any]) -> Domain:
    """The domain of a bundle's task entry. Raises ConfigError for an unknown task."""
    return DOMAINS[task_class(task).domain]()


def needed_bytes(bundle: Bundle, cases: Sequence[Case], mode: str) -> int:
    """Bytes of memory of the largest case; one that cannot be told is set aside under its code when its turn comes."""
    return _largest(domain_of(bundle.task).needed_bytes, bundle, cases, mode)


def scratch_bytes(bundle: Bundle, cases: Sequence[Case], mode: str) -> int:
    """Bytes of disk that the largest case takes while it runs; as `needed_bytes`."""
    return _largest(domain_of(bundle.task).scratch_bytes, bundle, cases, mode)


def _largest(told: Callable[[Bundle, Case, str], int], bundle: Bundle, cases: Sequence[Case], mode: str) -> int:
    predicted = [0]
    for case in cases:
        with suppress(InputError):
            predicted.append(told(bundle, case, mode))
    return max(predicted)


def predict(predictor: Predictor, case: Case, output: Path, progress: Progress | None = None) -> Report:
    """One case to its products, whatever its kind."""
    return domain_of(predictor.bundle.task).predict(predictor, case, output, progress)
