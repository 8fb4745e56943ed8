"""What a training leaves: cleaning chosen on held-out predictions, their table, and the bundle with a card that says
where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medmamba.bundle import Bundle, save_bundle
from pipelines.cases.cohort import LabelledCase
from pipelines.cases.formats import read_labels
from pipelines.config import TrainRun
from pipelines.learning.ceiling import interpolation_ceiling
from pipelines.learning.change_run import Run
from pipelines.learning.expected import expected
from pipelines.report import code_version, now
from pipelines.scoring.evaluate import Evaluation, Row, kept_path, left_out, score_case
from pipelines.tasks import segmentation_task
from pipelines.tasks.cleaning import choose, trial
from pipelines.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True)
class Held:
    """Cases that a network did not learn from, the folder of its predictions for them before any cleaning, and how
    these scored, where that is known."""

    cases: tuple[LabelledCase, ...]
    folder: Path
    scores: Evaluation | None = None


def draft(run: Run) -> Bundle:
    """The bundle that is being trained: everything but the weights."""
    return Bundle(
        name=run.name,
        network=run.architecture,
        config=run.network_config,
        preprocessing=run.preprocessing.contract(),
        task=run.task,
        folder=Path(run.output) / "bundle",
        weights=(),
        weight_hashes=(),
    )


def conclude(
    run: TrainRun, states: Sequence[Mapping[str, Tensor]], learned: Sequence[LabelledCase], held: Sequence[Held]
) -> Bundle:
    """Writes `<output>/bundle` with the weights `states`, learned from the cases `learned`, and `<output>/validation`
    with the scores of every held-out case as production gives them: after the cleaning that was chosen on them."""
    planned = draft(run)
    cleaning = chosen_cleaning(run, held) if run.cleaning == "auto" else {}
    task = {**planned.task, "cleaning": {k: row["steps"] for k, row in cleaning.items()}} if cleaning else planned.task
    scores = joined(run, held, segmentation_task(task))
    if scores is not None:
        scores.save(run.output / "validation")
    files, contract = [c.label for c in learned], planned.preprocessing
    seen = [*files, *(c.label for part in held for c in part.cases if c.label not in set(files))]
    card = {
        **run.card,
        "trained": now(),
        "code": code_version(),
        "cases": {"train": len(learned), "validation": sum(len(part.cases) for part in held)},
        "steps": run.steps,
        "folds": len(states),
        "interpolation_ceiling": interpolation_ceiling(seen, contract, run.labels),
        "expected": expected(files, run.labels),
        "cleaning": list(cleaning.values()),
        "validation": None if scores is None else scores.summary(),
    }
    return save_bundle(
        planned.folder,
        name=planned.name,
        network=planned.network,
        config=planned.config,
        preprocessing=contract,
        task=task,
        states=list(states),
        card=card,
    )


def chosen_cleaning(run: TrainRun, held: Sequence[Held]) -> dict[str, dict[str, Any]]:
    """Network class -> the `steps` that raise the mean Dice of its label over the held-out cases, and that Dice before
    and after; labels that nothing helps are left out. One case in memory at a time."""
    tried: dict[int, list[dict[tuple[str, ...], float]]] = {value: [] for value in run.labels}
    for part in held:
        for known in part.cases:
            (found, _), (truth, _) = read_labels(kept_path(part.folder, known)), read_labels(known.label)
            for value, dice in trial(found, truth, run.labels, run.ignore_label).items():
                tried[value].append(dice)
    result = {}
    for k, value in enumerate(run.labels, start=1):
        if tried[value]:
            means = {steps: float(np.mean([dice[steps] for dice in tried[value]])) for steps in tried[value][0]}
            if steps := choose({s: [mean] for s, mean in means.items()}):
                figures = {"dice_before": means[()], "dice": means[steps], "n": len(tried[value])}
                result[str(k)] = {"name": run.labels[value], "steps": list(steps), **figures}
    return result


def joined(run: TrainRun, held: Sequence[Held], task: Segmentation) -> Evaluation | None:
    """The scores of all held-out cases; None without such a case. They are scored again from their files where `task`
    cleans or nobody knows the scores."""
    if not held:
        return None
    rows: list[Row] = []
    for part in held:
        if part.scores is not None and not task.cleaning:
            rows += part.scores.rows
            continue
        for known in part.cases:
            (found, grid), (truth, _) = read_labels(kept_path(part.folder, known)), read_labels(known.label)
            found = left_out(task.finish(found), truth, run.ignore_label)
            rows += score_case(known.case.id, known.case.group, truth, found, grid, task.scored)
    return Evaluation(rows=tuple(rows), seed=run.seed)
