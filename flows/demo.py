"""The main job from end to end on a cohort made from one real brain: build, train, register, batch, evaluate, tell.

The order of things only. What is already there is not made again: the cohort and the bundle are keyed by the run file
and the code that makes the cohort, the batch by its own reports.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from flows.batch import ASIDE, WELL, run_batch
from flows.progress import progress
from flows.settings import prepare_environment
from medmamba.bundle import Bundle
from medmamba.errors import BundleError
from medmamba.files import hash_file, hash_json, write_bytes
from pipelines.cases import cohort
from pipelines.config import TrainRun
from pipelines.demo import cohort as demo_cohort
from pipelines.demo.cohort import Cohort
from pipelines.demo.threshold import fit_thresholds, write_thresholded
from pipelines.learning.train import train
from pipelines.pages.report import PAGE
from pipelines.report import Report
from pipelines.scoring.evaluate import Evaluation, evaluate
from pipelines.tracking import list_models, register_model, track_training

MODEL, ALIAS = "brain-tissue", "champion"
RUN_FILE = Path(demo_cohort.__file__).with_name("demo.toml")
WORSE = 1  # exit code when the network does not beat the threshold

Echo = Callable[[str], None]


def run_demo(folder: Path, echo: Echo) -> int:
    """Runs the demo below `folder` and tells what came out; the second time nothing is due.

    Returns 0, or 1 when the batch broke or the network is not better than the threshold.
    """
    prepare_environment()
    began, folder = time.monotonic(), folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tracking_in(folder) as store:
        key = hash_json({"run": hash_file(RUN_FILE), "cohort": hash_file(Path(demo_cohort.__file__))})[:8]
        places = make_cohort(folder / "cohort", key, echo)
        bundle = make_bundle(folder, key, echo)
        echo(f"batch: models:/{MODEL}@{ALIAS} over {places.archive}")
        code = run_batch(
            input=places.archive,
            bundle=f"models:/{MODEL}@{ALIAS}",
            output=folder / "results",
            settle=0.0,  # these files are ours: nobody is still copying them
            echo=echo,
        )
    if code not in (WELL, ASIDE):
        return code
    results = folder / "results" / bundle.title
    ours, threshold = scores(folder, places, results, echo)
    for line in (*case_table(results), *dice_table(ours, threshold), *endings(folder, results, store)):
        echo(line)
    echo(f"{time.monotonic() - began:.0f} s")
    better = (ours.mean() or 0.0) > (threshold.mean() or 0.0)
    if not better:
        echo("The network did NOT beat the intensity threshold: something is wrong with this training.")
    return WELL if better else WORSE


def make_cohort(folder: Path, key: str, echo: Echo) -> Cohort:
    """The cohort, built unless it is there for this key."""
    mark = folder / "key"
    places = Cohort(
        train=folder / "train" / "manifest.csv", test=folder / "test" / "manifest.csv", archive=folder / "archive"
    )
    if mark.exists() and mark.read_text() == key:
        echo(f"cohort: unchanged in {folder}")
        return places
    mark.unlink(missing_ok=True)
    echo(f"cohort: 16 cases and one damaged file from the MNI152 template, in {folder}")
    with progress("cohort") as update:
        places = demo_cohort.build(folder, progress=update)
    write_bytes(mark, key.encode())
    return places


def make_bundle(folder: Path, key: str, echo: Echo) -> Bundle:
    """The trained bundle, registered under the alias; an interrupted training goes on where it was."""
    run_file = folder / "demo.toml"
    write_bytes(run_file, RUN_FILE.read_bytes())
    run = TrainRun.load(run_file, output=folder / f"training-{key}-{version('medmamba')}")
    try:
        bundle = Bundle.load(run.output / "bundle")
        echo(f"training: unchanged, bundle {bundle.title}")
    except BundleError:
        echo(f"training: {run.architecture}, {run.steps} steps, run file {run_file}")
        with progress("training") as update, track_training(run.name, {"network": run.architecture}) as track:

            def log(figures: dict[str, float], step: int) -> None:
                track(figures, step)
                echo(f"  step {step} of {run.steps}: loss {figures['loss']:.3f}, {figures['seconds']:.0f} s")

            bundle = train(run, resume=True, log=log, progress=update)
        echo(f"training: bundle {bundle.title} in {bundle.folder}")
    known = [m for m in list_models() if m["name"] == MODEL and ALIAS in m["aliases"].split(", ")]
    if not any(m["bundle"] == bundle.id[:8] for m in known):
        echo(f"registered in MLflow as {MODEL}@{ALIAS}, version {register_model(bundle, MODEL, ALIAS)}")
    return bundle


def scores(folder: Path, places: Cohort, results: Path, echo: Echo) -> tuple[Evaluation, Evaluation]:
    """The batch's labels and those of the threshold against the truth of the held-out cases."""
    echo("evaluation: held-out cases against their labels, and the intensity threshold fitted on the training cases")
    baseline = folder / "threshold"
    truth = cohort.read(places.test, ["t1"])
    with progress("threshold") as update:
        write_thresholded(truth, fit_thresholds(cohort.read(places.train, ["t1"])), baseline, update)
    with progress("evaluation") as update:
        names = demo_cohort.TISSUES
        ours = evaluate(places.test, results, labels=names, output=folder / "evaluation", progress=update)
    return ours, evaluate(places.test, baseline, labels=names, output=folder / "evaluation" / "threshold")


def case_table(results: Path) -> list[str]:
    """A line a case: what came out of it, or why it was set aside."""
    reports = [Report.load(path) for path in sorted([*results.glob("*.json"), *results.glob("set_aside/*.json")])]
    names = list(demo_cohort.TISSUES.values())
    lines = ["", f"{'case':<14}{'result':<14}" + "".join(f"{n + ', ml':>18}" for n in names) + f"{'seconds':>10}"]
    for report in sorted((r for r in reports if r), key=lambda r: r.case):
        rows = {row["name"]: row["volume_ml"] for row in report.numbers.get("labels", {}).values()}
        volumes = "".join(f"{rows[n]:>18.0f}" if n in rows else f"{'-':>18}" for n in names)
        seconds = report.run.get("seconds")
        took = "-" if seconds is None else f"{seconds:.1f}"
        lines.append(f"{report.case:<14}{report.code or 'done':<14}{volumes}{took:>10}")
    return lines


def dice_table(ours: Evaluation, threshold: Evaluation) -> list[str]:
    """Dice a tissue beside the threshold's, with what the figure is worth."""
    lines = ["", f"{'Dice':<14}{'network':>10}{'threshold':>12}"]
    other = {s["label"]: s["dice"] for s in threshold.summary()}
    for row in ours.summary():
        lines.append(f"{row['name']:<14}{row['dice']:>10.3f}{other[row['label']]:>12.3f}")
    lines.append(f"{'mean':<14}{ours.mean() or 0:>10.3f}{threshold.mean() or 0:>12.3f}")
    count = len({row.case for row in ours.rows})
    lines.append(
        f"{count} held-out cases. All cases, for training and for testing, come from ONE head (the MNI152 template),"
        " deformed at random:"
    )
    return [*lines, "the figure shows that the programs work and says nothing about patients."]


def endings(folder: Path, results: Path, store: str) -> list[str]:
    """Where everything lies."""
    aside = sorted((results / "set_aside").glob("*.json"))
    return [
        "",
        f"results     {results}",
        *(f"quarantine  {path}" for path in aside),
        f"page        {results / PAGE}",
        f"evaluation  {folder / 'evaluation'}",
        f"MLflow      {Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {store}",
    ]


@contextmanager
def tracking_in(folder: Path) -> Iterator[str]:
    """MLflow's store inside the demo's folder, whatever the user's own is; yields its address."""
    before, store = os.environ.get("MLFLOW_TRACKING_URI"), f"sqlite:///{folder / 'mlflow.db'}"
    os.environ["MLFLOW_TRACKING_URI"] = store
    try:
        yield store
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
