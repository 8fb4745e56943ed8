"""Change learned from a data set of the field: pairs through the view of production, labels, validation, the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from geo.quality import unobserved
from medmamba.bundle import save_bundle
from medmamba.errors import ConfigError, InputError
from medmamba.preprocessing import Preprocessing
from medmamba.sample import Image
from medmamba.source import ArraySource, Source, read_all
from medmamba.windows import Window
from pipelines.layouts.change import ChangeSet, PairRow
from pipelines.layouts.change_labels import IGNORED as UNLABELLED
from pipelines.learning.change_run import ChangeRun
from pipelines.learning.change_variations import varied
from pipelines.learning.learned import draft
from pipelines.learning.losses import IGNORED
from pipelines.learning.sampling import Example, Vary, find_places, fitted
from pipelines.report import code_version, now
from pipelines.scoring.change_evaluate import (
    LARGEST_SAME_SCENE,
    ChangeEvaluation,
    check_model,
    evaluate_pairs,
    require_pairs,
    usable,
)
from pipelines.serving.pair_view import PairView, open_pair
from pipelines.serving.predict import Predictor
from pipelines.tasks import build_task, change_of
from pipelines.tasks.change import Comparison, Loss

SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """One pair kept in the numbers of its files: `seen` scales a patch when it is drawn. `labels` (L, H, W): change,
    for semantic change also the classes at both dates; IGNORED where they do not count."""

    id: str
    seen: Source
    labels: np.ndarray
    places: Mapping[int, np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.labels.shape[1:]

    def patch(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        window = Window(start=tuple(s.start for s in box), size=tuple(s.stop - s.start for s in box))
        return self.seen.read(window).array, self.labels[(slice(None), *box)]


@dataclass(frozen=True, kw_only=True)
class ChangeLesson:
    """Pairs of a change data set; the threshold and the calibration of the bundle come from the held-out ones."""

    run: ChangeRun
    train: tuple[PairRow, ...]
    validation: tuple[PairRow, ...]

    @classmethod
    def of(cls, run: ChangeRun) -> ChangeLesson:
        """Reads the data set's lists. Raises ConfigError when nothing is left to learn from."""
        train, validation = split(run.found, share=run.validation_share, seed=run.seed)
        try:
            require_pairs((*train, *validation))
        except InputError as error:
            raise ConfigError(f"{error}; `medmamba check {run.dataset}` lists every fault") from error
        return cls(run=run, train=train, validation=validation)

    @property
    def criterion(self) -> Loss:
        return change_of(build_task(self.run.task)).loss

    @property
    def learned(self) -> Sequence[str]:
        return [row.id for row in self.train]

    @property
    def held(self) -> Sequence[str]:
        return [row.id for row in self.validation]

    @property
    def vary(self) -> Vary:
        return partial(varied, settings=self.run.augment)

    def examples(self) -> Sequence[Example]:
        """Every pair to learn from. Raises ConfigError listing those that cannot be read."""
        faults, found = [], []
        for row in self.train:
            try:
                found.append(example(self.run, row))
            except InputError as error:
                faults.append(f"  {row.id}: {error.code}: {error}")
        if faults:
            more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            listed = "\n".join(faults[:SHOWN])
            raise ConfigError(f"{self.run.dataset}: {len(faults)} pairs cannot be learned from\n{listed}{more}")
        return found

    def validate(self, predictor: Predictor, *, last: bool) -> ChangeEvaluation:
        return evaluate_pairs(predictor, self.run.found, self.validation, seed=self.run.seed)

    def figures(self, scores: ChangeEvaluation) -> dict[str, float]:
        return scores.figures()

    def conclude(
        self, predictor: Predictor, state: Mapping[str, Tensor], scores: ChangeEvaluation | None
    ) -> dict[str, float]:
        """Writes `<output>/bundle` and `<output>/validation`; returns the checks of the model."""
        run, planned = self.run, draft(self.run)
        task, checks = dict(run.task), {}
        if self.validation:
            scores = scores or self.validate(predictor, last=True)
            scores.save(run.output / "validation")
            curve = [round(float(v), 5) for v in scores.confidence.curve()]
            task |= {"threshold": scores.threshold, "curve": curve}
            checks = check_model(predictor, usable(self.validation), scores.threshold)
        card = {
            **run.card,
            "trained": now(),
            "code": code_version(),
            "dataset": run.found.describe(),
            "cases": {"train": len(self.train), "validation": len(self.validation)},
            "steps": run.steps,
            "checks": checks,
            "doubts": doubts(checks),
            "validation": None if scores is None else scores.summary(),
        }
        save_bundle(
            planned.folder,
            name=planned.name,
            network=planned.network,
            config=planned.config,
            preprocessing=planned.preprocessing,
            task=task,
            states=[state],
            card=card,
        )
        return {f"check_{name}": value for name, value in checks.items()}


def doubts(checks: Mapping[str, float]) -> list[str]:
    """Sentences on checks that failed."""
    share = checks.get("same_scene_changed", 0.0)
    if share <= LARGEST_SAME_SCENE:
        return []
    return [f"of a scene against itself {share:.1%} are named changed; at most {LARGEST_SAME_SCENE:.0%} should be"]


def split(dataset: ChangeSet, *, share: float, seed: int) -> tuple[tuple[PairRow, ...], tuple[PairRow, ...]]:
    """Pairs to learn from and held out: as the data set says; where it names none to hold out, whole scenes by `seed`.

    Test pairs are left out. Raises ConfigError when nothing is left to learn from.
    """
    train = tuple(r for r in dataset.rows if r.split in ("train", ""))
    held = tuple(r for r in dataset.rows if r.split == "validation")
    if not held and share > 0:
        groups = sorted({r.group for r in train})
        drawn = {
            groups[i]
            for i in np.random.default_rng(seed).permutation(len(groups))[: max(1, round(share * len(groups)))]
        }
        train, held = tuple(r for r in train if r.group not in drawn), tuple(r for r in train if r.group in drawn)
    if not train:
        raise ConfigError(f"{dataset.describe()}: none left to train on; add pairs or lower validation_share")
    return train, held


def example(run: ChangeRun, row: PairRow) -> PairExample:
    """A pair as production sees it, but for the registration, with its labels. Raises InputError."""
    contract = run.preprocessing.contract()
    comparison = replace(Comparison.from_settings(run.comparison), register="none")
    view = open_pair({role: row.files[role] for role in ("before", "after")}, comparison)
    try:
        seen = in_memory(view, contract)
        hidden = unobserved(view.qualities, Window.whole(view.grid.shape)) > 0
    finally:
        view.close()
    labels = label_planes(run, row, hidden)
    grid = view.grid
    padded = fitted(seen, contract)
    lacking = [n - m for n, m in zip(padded.grid.shape, grid.shape, strict=True)]
    sides = [(0, 0), *((n // 2, n - n // 2) for n in lacking)]
    labels = np.pad(labels, sides, constant_values=IGNORED)
    return PairExample(id=row.id, seen=padded, labels=labels, places=find_places(labels[0]))


def in_memory(view: PairView, contract: Preprocessing) -> Source:
    """The pair read whole, in whole numbers where its files hold such: a quarter of the memory of scaled floats."""
    parts: dict[str, Source] = {}
    for role, scene in (("before", view.before), ("after", view.after)):
        image = read_all(scene)
        stored = view.qualities[0 if role == "before" else 1].scene.dtype
        array = image.array
        if stored.kind in "iu" and array.dtype.kind == "f":
            limits = np.iinfo(stored)
            array = np.clip(np.rint(array), limits.min, limits.max).astype(stored)
        parts[role] = ArraySource(Image(array, image.grid, image.channels, image.valid))
    return contract.forward(parts)


def label_planes(run: ChangeRun, row: PairRow, hidden: np.ndarray) -> np.ndarray:
    """Labels (L, H, W) int16 of a pair; IGNORED where a date is `hidden` or nobody labelled. Raises InputError."""
    change, *dates = run.found.labels(row)
    if change.shape != hidden.shape:
        raise InputError("grid_mismatch", f"{row.id}: labels {change.shape} on images {hidden.shape}")
    planes = np.stack([change.astype(np.int16), *(d.astype(np.int16) for d in dates if run.classes)])
    unlabelled = np.logical_or.reduce([d == UNLABELLED for d in dates], initial=False) if run.classes else False
    return np.where(hidden | unlabelled, np.int16(IGNORED), planes)
