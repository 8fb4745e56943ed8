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
    `needed_bytes` in memory; `lines` of a report for the terminal."""

    find: Callable[..., Any]
    cases_of: Callable[..., list[Case]]
    parts: Callable[[Path], tuple[Path, ...]]
    predict: Callable[[Predictor, Case, Path, Progress | None], Report]
    needed_bytes: Callable[[Bundle, Case], int]
    lines: Callable[[Report], list[str]]


@cache
def volumes() -> Domain:
    """Volumes and planes of medicine."""
    from pipelines.cases import archive, formats
    from pipelines.serving import budget, predict

    return Domain(
        find=archive.find,
        cases_of=archive.cases_of,
        parts=formats.parts_of,
        predict=predict.predict,
        needed_bytes=budget.predicted_bytes,
        lines=predict.lines_of,
    )


@cache
def pairs() -> Domain:
    """Two scenes of one place."""
    from pipelines.cases import pair_archive
    from pipelines.serving.predict_pair import lines_of, predict_pair

    return Domain(
        find=pair_archive.find,
        cases_of=pair_archive.cases_of,
        parts=pair_archive.parts_of,
        predict=predict_pair,
        needed_bytes=pair_archive.predicted_bytes,
        lines=lines_of,
    )


DOMAINS: dict[str, Callable[[], Domain]] = {"volumes": volumes, "pairs": pairs}


def domain_of(task: Mapping[str, Any]) -> Domain:
    """The domain of a bundle's task entry. Raises ConfigError for an unknown task."""
    return DOMAINS[task_class(task).domain]()


def needed_bytes(bundle: Bundle, cases: Sequence[Case]) -> int:
    """Bytes of the largest of these cases; one that cannot be told is set aside under its code when its turn comes."""
    predicted = [0]
    for case in cases:
        with suppress(InputError):
            predicted.append(domain_of(bundle.task).needed_bytes(bundle, case))
    return max(predicted)


def predict(predictor: Predictor, case: Case, output: Path, progress: Progress | None = None) -> Report:
    """One case to its products, whatever its kind."""
    return domain_of(predictor.bundle.task).predict(predictor, case, output, progress)
