"""A cohort in folds: each case is held out once, from a network that sees no case of its group; the bundle holds all.

A fold is a training of its own in `<output>/fold_<k>`. What is chosen and told (cleaning, the validation table) rests
on every case, predicted by the network that did not learn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safetensors.torch import load_file

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError
from pipelines.cases import cohort
from pipelines.cases.cohort import LabelledCase
from pipelines.config import TrainRun
from pipelines.learning.learned import conclude
from pipelines.learning.lessons import VolumeLesson, read_cases
from pipelines.learning.plan import make_folds

Log = Callable[[dict[str, float], int], None]
Step = Callable[[int, int], None]


def fold_lessons(run: TrainRun) -> list[VolumeLesson]:
    """A lesson a fold, each with its own output folder and seed. Raises ConfigError listing every fault."""
    parts = fold_parts(read_cases(run), run.folds, seed=run.seed)
    runs = [
        run.model_copy(update={"output": run.output / f"fold_{k}", "seed": run.seed + k, "cleaning": "none"})
        for k in range(run.folds)
    ]
    return [VolumeLesson(run=own, parts=part) for own, part in zip(runs, parts, strict=True)]


def fold_parts(cases: Sequence[LabelledCase], count: int, *, seed: int) -> tuple[cohort.Split, ...]:
    """What each fold learns from and holds out: by the `fold` column, else whole groups with each site spread evenly.

    Test cases stay out. Raises ConfigError when the column names other than `count` folds, is not filled everywhere, or
    tears a group, and when there are fewer groups than folds."""
    open_cases = tuple(c for c in cases if c.split != "test")
    held = saved_folds(open_cases, count) or [set(fold) for fold in make_folds(open_cases, count, seed=seed)]
    if len(held) < count:
        groups = len({c.case.group for c in open_cases})
        raise ConfigError(f"folds = {count}: {groups} groups (patients) cannot fill them; ask for fewer folds")
    return tuple(
        cohort.Split(
            train=tuple(c for c in open_cases if c.case.id not in ids),
            validation=tuple(c for c in open_cases if c.case.id in ids),
        )
        for ids in held
    )


def saved_folds(cases: Sequence[LabelledCase], count: int) -> list[set[str]]:
    """Ids by fold as the cohort names them, none when it names no fold."""
    names = sorted({c.fold for c in cases}, key=lambda name: (len(name), name))
    if names in ([], [""]):
        return []
    fold_of = {c.case.group: c.fold for c in cases}
    torn = sorted({c.case.group for c in cases if c.fold != fold_of[c.case.group]})
    if "" in names or len(names) != count or torn:
        found = f"groups {torn[:10]} stand in several folds" if torn else f"the column fold holds {names}"
        raise ConfigError(f"folds = {count}: {found}; name {count} folds, fill all rows, keep a patient in one fold")
    return [{c.case.id for c in cases if c.fold == name} for name in names]


def fold_told(k: int, run: TrainRun, log: Log | None, progress: Step | None) -> tuple[Log | None, Step | None]:
    """The callbacks of fold `k`: figures under its name, steps counted over all folds."""

    def figures(values: dict[str, float], step: int) -> None:
        if log:
            log({f"fold_{k}/{name}": value for name, value in values.items()}, k * run.steps + step)

    def step(done: int, _: int) -> None:
        if progress:
            progress(k * run.steps + done, run.folds * run.steps)

    return figures if log else None, step if progress else None


def conclude_folds(run: TrainRun, lessons: Sequence[VolumeLesson]) -> Bundle:
    """One bundle of the weights of every fold, told by the cases that each held out."""
    folds = [Bundle.load(lesson.run.output / "bundle") for lesson in lessons]
    states = [load_file(fold.folder / fold.weights[0]) for fold in folds]
    kept = [lesson.kept for lesson in lessons]
    return conclude(run, states, [c for part in kept for c in part.cases], kept)
