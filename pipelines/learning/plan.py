"""From a cohort's fingerprint to a run file: spacing, patch, clip and folds, by rules that stand here to be read.

Target spacing is the median; an axis more than 3 times coarser than the finest takes its 10th percentile, so that
thin stacks are not blown up (nnU-Net's rule). The patch starts at the volume of 256^3 cells, is shaped by the spacing,
cut to the median image, and shrunk along the axis that is largest against it until a training step fits the memory.
"""

from __future__ import annotations

import csv
import io
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.errors import ConfigError
from medmamba.files import write_bytes, write_json
from medmamba.memory import predict, without_data
from pipelines.cases import cohort
from pipelines.cases.case import safe_id
from pipelines.cases.cohort import LabelledCase
from pipelines.cases.fingerprint import Fingerprint, RoleFacts, fingerprint
from pipelines.cases.manifest import read_dataset, roles_of
from pipelines.learning.step_memory import training_loss
from pipelines.networks import NETWORKS, segmentation_settings

ANISOTROPY = 3.0
START = 256**3
MULTIPLE = 16  # cells: every network of ours halves at most four times
WIDENED = 0.25  # share of the whole range by which the expected quantiles are widened
CT_BELOW = -200.0  # Hounsfield: no other modality has a hundredth of its values there


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What the rules chose for a cohort; `median_shape` at the target spacing, `folds` the ids held out in each."""

    roles: Mapping[str, Mapping[str, Any]]
    labels: Mapping[int, str]
    spacing_mm: tuple[float, ...]
    median_shape: tuple[int, ...]
    patch: tuple[int, ...]
    folds: tuple[tuple[str, ...], ...]
    ignore: int | None = None
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    written: tuple[int, ...] = ()


def make_plan(
    found: Fingerprint, cases: Sequence[LabelledCase], labels: Mapping[int, str], *,
    fits: Callable[[tuple[int, ...]], bool], folds: int = 5, seed: int = 0,
) -> TrainPlan:  # fmt: skip
    """Applies the rules; `fits` says whether a training step on a patch fits the memory. Raises ConfigError."""
    spacing = target_spacing(found.spacings, found.shapes)
    median = np.median(found.shapes * found.spacings / np.array(spacing), axis=0)
    shape = tuple(max(1, round(float(n))) for n in median)
    return TrainPlan(
        roles={role: channel(role, facts) for role, facts in found.roles.items()},
        labels=labels,
        spacing_mm=spacing,
        median_shape=shape,
        patch=patch_shape(shape, spacing, fits),
        folds=make_folds(cases, folds, seed=seed),
    )


def plan_cohort(
    place: Path,
    output: Path,
    *,
    architecture: str = "mamba_unet",
    memory: int,
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainPlan:
    """Plans a table or data set and writes `run.toml`, `manifest.csv` (fold `fold` held out) and `plan.json` into
    `output`. Folds that the data set has saved are kept. Raises ConfigError with every fault of the cohort."""
    dataset, roles = read_dataset(place), roles_of(place)
    cases = tuple(c for c in cohort.read(place, roles) if c.split != "test")
    found = fingerprint(cases, progress)
    ignore = dataset.ignore if dataset else None
    values = sorted({v for c in found.cases for v in c.voxels} - {0, ignore})
    names = dict(dataset.labels) if dataset else {}
    labels = {int(v): names.get(v, f"label {v}") for v in values if v is not None}
    regions, written = (dict(dataset.regions), dataset.written) if dataset else ({}, ())
    labels = dict(dataset.labels) if dataset and regions else labels
    fits = fitting(architecture, {}, channels=len(roles), classes=len(regions) or len(labels) + 1, budget=memory)
    plan = make_plan(found, cases, labels, fits=fits, folds=folds, seed=seed)
    saved = dataset.folds if dataset else ()
    plan = replace(plan, ignore=ignore, regions=regions, written=written, folds=saved or plan.folds)
    if plan.folds and not 0 <= fold < len(plan.folds):
        raise ConfigError(f"fold {fold}: the plan has the folds 0 to {len(plan.folds) - 1}")
    name = safe_id(place.resolve().stem)
    write_bytes(output / "manifest.csv", table(cases, roles, plan.folds, fold).encode())
    write_json(output / "plan.json", {**asdict(plan), "fingerprint": found.to_json()})
    write_bytes(output / "run.toml", run_file(plan, name=name, architecture=architecture).encode())
    return plan


def table(cases: Sequence[LabelledCase], roles: Sequence[str], folds: Sequence[Sequence[str]], fold: int) -> str:
    """The cases as a manifest (CSV) with absolute paths, the number of the fold that holds each out, and the split."""
    number = {case: k for k, held in enumerate(folds) for case in held}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "group", "site", *roles, "label", "fold", "split"])
    for c in cases:
        k = number.get(c.case.id, "")
        images = [str(c.case.files[role].resolve()) for role in roles]
        split = "validation" if k == fold else "train"
        writer.writerow([c.case.id, c.case.group, c.site, *images, str(c.label.resolve()), k, split])
    return text.getvalue()


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[float, ...]:
    """mm along each axis from spacings and shapes (cases, axes)."""
    target, cells = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(target.argmax())
    others = [a for a in range(len(target)) if a != worst]
    if target[worst] > ANISOTROPY * target[others].min() and cells[worst] * ANISOTROPY < cells[others].min():
        target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max())
    return tuple(round(float(s), 4) for s in target)


def patch_shape(
    median_shape: Sequence[int], spacing: Sequence[float], fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    """Cells of the patch, each axis a multiple of MULTIPLE. Raises ConfigError when not even the smallest fits."""
    inverse = 1 / np.array(spacing)
    wanted = inverse * (START / inverse.prod()) ** (1 / len(inverse))
    most = [max(MULTIPLE, -(-n // MULTIPLE) * MULTIPLE) for n in median_shape]
    patch = [min(m, max(MULTIPLE, round(float(w)) // MULTIPLE * MULTIPLE)) for m, w in zip(most, wanted, strict=True)]
    tried = [tuple(patch)]
    while max(patch) > MULTIPLE:
        open_axes = [a for a in range(len(patch)) if patch[a] > MULTIPLE]
        patch[max(open_axes, key=lambda a: (patch[a] / median_shape[a], patch[a]))] -= MULTIPLE
        tried.append(tuple(patch))
    first = bisect_left(tried, True, key=fits)  # they only get smaller, so one search finds the first that fits
    if first == len(tried):
        raise ConfigError(f"a training step on {tried[-1]} does not fit the memory; give more, or a smaller network")
    return tried[first]


def fitting(
    architecture: str,
    settings: Mapping[str, Any],
    *,
    channels: int,
    classes: int,
    budget: int,
    batch: int = 2,
) -> Callable[[tuple[int, ...]], bool]:
    """Whether a training step of a network on `batch` patches takes no more than `budget` bytes, by the house's
    prediction on tensors without data."""

    def fits(patch: tuple[int, ...]) -> bool:
        own = segmentation_settings(architecture, settings, in_channels=channels, out_channels=classes, size=patch)
        network = without_data(lambda: NETWORKS[architecture](own))
        return predict(network, (batch, channels, *patch), loss=training_loss).total <= budget

    return fits


def channel(role: str, facts: RoleFacts) -> dict[str, Any]:
    """Settings of a channel: CT is clipped to what labels cover and scaled by the cohort's own figures, with the units
    it must have; everything else is scaled image by image."""
    if role.casefold() != "ct" and facts.low[1] > CT_BELOW:
        return {"scaling": "zscore"}
    margin = WIDENED * (facts.high[1] - facts.low[0])
    return {
        "scaling": "fixed",
        "clip": [round(facts.percentile_00_5, 2), round(facts.percentile_99_5, 2)],
        "shift": round(facts.mean, 3),
        "scale": round(max(facts.std, 1e-3), 3),
        "low_between": [round(facts.low[0] - margin, 1), round(facts.low[1] + margin, 1)],
        "high_between": [round(facts.high[0] - margin, 1), round(facts.high[1] + margin, 1)],
    }


def make_folds(cases: Sequence[LabelledCase], count: int, *, seed: int) -> tuple[tuple[str, ...], ...]:
    """Ids held out in each fold: whole groups (patients), each site spread as evenly as its groups allow.

    As many folds as there are groups when there are fewer; none for one group. The order of the cases does not matter.
    """
    groups: dict[str, list[LabelledCase]] = {}
    for case in sorted((c for c in cases if c.split != "test"), key=lambda c: c.case.id):
        groups.setdefault(case.case.group, []).append(case)
    count = min(count, len(groups)) if len(groups) > 1 else 0
    order = [sorted(groups)[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    order.sort(key=lambda g: (groups[g][0].site, -len(groups[g])))
    held: list[list[LabelledCase]] = [[] for _ in range(count)]
    for name in order if count else ():
        site = groups[name][0].site
        least = min(range(count), key=lambda k: (sum(c.site == site for c in held[k]), len(held[k])))
        held[least] += groups[name]
    return tuple(tuple(sorted(c.case.id for c in fold)) for fold in held)


def run_file(plan: TrainPlan, *, name: str, architecture: str) -> str:
    """The text of a run file (TOML) for `medmamba train`."""
    lines = [
        "# Written by `medmamba plan`; every figure may be changed.",
        f"name = {_toml(name)}",
        'manifest = "manifest.csv"',
        'output = "training"',
        f"architecture = {_toml(architecture)}",
        *([] if plan.ignore is None else [f"ignore_label = {plan.ignore} # not annotated: neither learned nor scored"]),
        *([f"regions_class_order = {_toml(plan.written)} # written one over the other"] if plan.regions else []),
        "",
        "[labels] # value in the label files -> name",
        *(f"{value} = {_toml(label)}" for value, label in plan.labels.items()),
        *(["", "[regions] # name -> label values"] if plan.regions else []),
        *(f"{_toml(name)} = {_toml(values)}" for name, values in plan.regions.items()),
        "",
        "[preprocessing]",
        f"window = {_toml(plan.patch)} # cells (z, y, x); the median image has {list(plan.median_shape)}",
        f"spacing_mm = {_toml(plan.spacing_mm)}",
    ]
    for role, settings in plan.roles.items():
        lines += ["", "[[preprocessing.channels]]", f"role = {_toml(role)}"]
        lines += [f"{key} = {_toml(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def describe(plan: TrainPlan) -> list[str]:
    """The plan in lines for a person."""
    return [
        f"target spacing {list(plan.spacing_mm)} mm, median image {list(plan.median_shape)}, patch {list(plan.patch)}",
        f"labels: {', '.join(f'{v} {name}' for v, name in plan.labels.items())}",
        *(f"channel {role}: {json.dumps(settings)}" for role, settings in plan.roles.items()),
        f"{len(plan.folds)} folds of {', '.join(str(len(f)) for f in plan.folds)} cases"
        if plan.folds
        else "no folds: all cases are of one group",
    ]


def _toml(value: Any) -> str:
    """Strings, numbers and lists are written alike in JSON and TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
