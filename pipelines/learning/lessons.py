"""What differs between tasks in the one training loop: cases, loss, validation, and what is left in the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.cases import cohort
from pipelines.config import TrainRun
from pipelines.learning.change_run import Run
from pipelines.learning.learned import Held, conclude
from pipelines.learning.losses import dice_bce, dice_ce
from pipelines.learning.sampling import Example, Vary, as_drawn, prepare
from pipelines.scoring.evaluate import Evaluation, evaluate_predictor, kept_path
from pipelines.serving.predict import Predictor

Criterion = Callable[[Tensor, Tensor], Tensor]
State = Mapping[str, Tensor]


class Lesson(Protocol):
    """Ids of the cases `learned` from and `held` out; `criterion` of scores and labels; `examples` to draw from, and to
    `vary` before the augmentations that all tasks share; `validate` (`last`: after the last epoch) and its `figures`
    for the log; `conclude` writes the bundle and returns figures for the log."""

    @property
    def criterion(self) -> Criterion: ...
    @property
    def learned(self) -> Sequence[str]: ...
    @property
    def held(self) -> Sequence[str]: ...
    @property
    def vary(self) -> Vary: ...
    def examples(self) -> Sequence[Example]: ...
    def validate(self, predictor: Predictor, *, last: bool) -> Any: ...
    def figures(self, scores: Any) -> dict[str, float]: ...
    def conclude(self, predictor: Predictor, state: State, scores: Any) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class VolumeLesson:
    """Segmentation: a manifest of images and label files; validation is production's own prediction."""

    run: TrainRun
    parts: cohort.Split

    @classmethod
    def of(cls, run: TrainRun) -> VolumeLesson:
        """Reads the cohort. Raises ConfigError listing every fault."""
        return cls(run=run, parts=cohort.split(read_cases(run), validation_share=run.validation_share, seed=run.seed))

    @property
    def criterion(self) -> Criterion:
        """Of classes, or of regions where the run names some."""
        rows = [[value in values for value in (0, *self.run.labels)] for values in self.run.regions.values()]
        return partial(dice_bce, members=torch.tensor(rows)) if rows else dice_ce

    @property
    def learned(self) -> Sequence[str]:
        return [c.case.id for c in self.parts.train]

    @property
    def held(self) -> Sequence[str]:
        return [c.case.id for c in self.parts.validation]

    @property
    def vary(self) -> Vary:
        return as_drawn

    def examples(self) -> Sequence[Example]:
        contract = self.run.preprocessing.contract()
        return [prepare(c, contract, tuple(self.run.labels), self.run.ignore_label) for c in self.parts.train]

    def validate(self, predictor: Predictor, *, last: bool) -> Evaluation:
        kept, run = self.kept, self.run
        folder = kept.folder if last else None
        return evaluate_predictor(predictor, kept.cases, ignore=run.ignore_label, seed=run.seed, keep=folder)

    def figures(self, scores: Evaluation) -> dict[str, float]:
        """Means; what is undefined is left out."""
        figures = {f"validation_dice/{s['label']}": s["dice"] for s in scores.summary()}
        figures |= {f"validation_{name}": scores.mean(name) for name in ("dice", "nsd", "hd95_mm")}
        return {k: float(v) for k, v in figures.items() if v is not None}

    def conclude(self, predictor: Predictor, state: State, scores: Evaluation | None) -> dict[str, float]:
        kept = self.kept
        if scores is None and not all(kept_path(kept.folder, known).exists() for known in kept.cases):
            scores = self.validate(predictor, last=True)
        conclude(self.run, [state], self.parts.train, [replace(kept, scores=scores)] if kept.cases else [])
        return {}

    @property
    def kept(self) -> Held:
        """Where the predictions of the cases held out lie when the last epoch is done."""
        return Held(cases=self.parts.validation, folder=self.run.output / "validation")


def read_cases(run: TrainRun) -> tuple[cohort.LabelledCase, ...]:
    """The cohort of a run. Raises ConfigError listing every fault."""
    ignored = () if run.ignore_label is None else (run.ignore_label,)
    listed = (*run.labels, *ignored) if run.other_labels == "refuse" else None
    return cohort.read(run.manifest, run.preprocessing.contract().roles, labels=listed)


def lesson_of(run: Run) -> Lesson:
    """The lesson of a run file. Raises ConfigError listing every fault of its data."""
    if isinstance(run, TrainRun):
        return VolumeLesson.of(run)
    from pipelines.learning.change_lesson import ChangeLesson

    return ChangeLesson.of(run)
