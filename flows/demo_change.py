"""The change job from end to end on a made landscape: two scenes of which we know what changed; train, predict, tell.

The order of things only. What is there for this run file and this maker of data is not made again.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from flows.demo import Echo, progress, tracking_in
from flows.settings import prepare_environment
from medmamba.bundle import Bundle
from medmamba.errors import BundleError
from medmamba.files import hash_file, hash_json, write_bytes
from pipelines.demo import change as demo_change
from pipelines.demo.change import Made
from pipelines.domains import domain_of
from pipelines.learning.change_run import ChangeRun, load_run
from pipelines.learning.train import train
from pipelines.serving.predict import Predictor
from pipelines.tracking import register_model, track_training

MODEL, ALIAS = "new-houses", "champion"
RUN_FILE = Path(demo_change.__file__).with_name("demo_change.toml")
GOOD_F1 = 0.8  # below, something is wrong with this training
WELL, WORSE = 0, 1


def run_demo_change(folder: Path, echo: Echo) -> int:
    """Runs the demo below `folder` and tells F1, hectares and paths. Returns 0, or 1 when the map is poor."""
    prepare_environment()
    began, folder = time.monotonic(), folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    key = hash_json({"run": hash_file(RUN_FILE), "data": hash_file(Path(demo_change.__file__))})[:8]
    made = make_data(folder, key, echo)
    with tracking_in(folder) as store:
        bundle = make_bundle(folder, made, key, echo)
    domain = domain_of(bundle.task)
    predictor = Predictor.load(bundle)
    case = domain.cases_of([made.before, made.after], bundle.preprocessing.roles, output=folder / "results")[0]
    echo(f"predict: {made.before.name} and {made.after.name}, another season and shifted against each other")
    with progress("predict") as update:
        report = domain.predict(predictor, case, folder / "results", update)
    for line in (*domain.lines(report), *(f"warning: {text}" for text in report.warnings)):
        echo(f"  {line}")
    results = folder / "results" / bundle.title
    told = demo_change.score(results / f"{case.id}_change.tif", made.truth)
    registration = report.numbers["registration"]
    echo(f"truth     {told['true_hectares']:.3f} ha changed; the map says {report.numbers['areas']['changed']:.3f} ha")
    echo(f"shift     {registration['verdict']}: {registration['reason']} (made: {demo_change.SHIFT_PX})")
    echo(f"F1        {told['f1']:.3f}   IoU {told['iou']:.3f}   (made landscape: it shows that the programs work)")
    for name, path in endings(results, case.id, store).items():
        echo(f"{name:<10}{path}")
    echo(f"{time.monotonic() - began:.0f} s")
    return WELL if told["f1"] >= GOOD_F1 else WORSE


def make_data(folder: Path, key: str, echo: Echo) -> Made:
    """Tiles and scenes, built unless they are there for this key."""
    place = folder / f"data-{key}"
    mark = place / "whole"
    if mark.exists():
        echo(f"data: unchanged in {place}")
        return demo_change.places(place)
    echo(f"data: {sum(demo_change.TILES.values())} labelled tiles and a pair of scenes, in {place}")
    with progress("data") as update:
        made = demo_change.build(place, progress=update)
    write_bytes(mark, b"")
    return made


def make_bundle(folder: Path, made: Made, key: str, echo: Echo) -> Bundle:
    """The trained bundle, registered under the alias; an interrupted training goes on where it was."""
    run_file = folder / RUN_FILE.name
    write_bytes(run_file, RUN_FILE.read_bytes())
    run = load_run(run_file, dataset=made.tiles, output=folder / f"training-{key}-{version('medmamba')}")
    assert isinstance(run, ChangeRun)
    try:
        bundle = Bundle.load(run.output / "bundle")
        echo(f"training: unchanged, bundle {bundle.title}")
        return bundle
    except BundleError:
        echo(f"training: {run.architecture}, {run.steps} steps, run file {run_file}")
    with progress("training") as update, track_training(run.name, {"network": run.architecture}) as track:

        def log(figures: dict[str, float], step: int) -> None:
            track(figures, step)
            told = {"loss": "loss", "validation_f1": "F1", "check_same_scene_changed": "f(A, A) changed"}
            seen = ", ".join(f"{name} {figures[key]:.3f}" for key, name in told.items() if key in figures)
            echo(f"  step {step} of {run.steps}: {seen}")

        bundle = train(run, resume=True, log=log, progress=update)
    echo(f"registered in MLflow as {MODEL}@{ALIAS}, version {register_model(bundle, MODEL, ALIAS)}")
    return bundle


def endings(results: Path, case: str, store: str) -> dict[str, str]:
    """Where everything lies."""
    return {
        "map": f"{results / case}_change.tif",
        "polygons": f"{results / case}_polygons.gpkg",
        "page": f"{results / case}_page.html",
        "results": str(results),
        "MLflow": store,
    }
