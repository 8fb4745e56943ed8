"""The command `medmamba`. Heavy imports live inside the commands: `--help` answers at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.settings import prepare_environment

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segmentation of archives of volumes with state-space networks: predict, batch, train, evaluate.",
)
models = typer.Typer(no_args_is_help=True, help="Models registered in MLflow.")
app.add_typer(models, name="models")

BundleOption = Annotated[str, typer.Option(help="Folder of a bundle, or models:/NAME@ALIAS.")]
OutputOption = Annotated[Path, typer.Option(help="Folder for all products.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="Windows shown to the network at once.")]


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="The files of one case, in the order of the bundle's channels.")],
    bundle: BundleOption,
    output: OutputOption,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 1,
) -> None:
    """Segment one case: labels on its own grid, a picture and a report."""
    from flows.gpu import gpu_lock
    from pipelines.case import Case, safe_id
    from pipelines.formats import stem_of
    from pipelines.predict import Predictor, product_path
    from pipelines.predict import predict as run_case
    from pipelines.state import STATE
    from pipelines.tracking import resolve

    resolved = resolve(bundle, output / STATE / "models")
    predictor = Predictor.load(resolved.bundle, device=device, batch=batch_size)
    roles = predictor.bundle.preprocessing.roles
    if len(files) != len(roles):
        raise typer.BadParameter(f"{len(files)} files given, the bundle wants {len(roles)}: {', '.join(roles)}")
    case = Case(id=safe_id(stem_of(files[0])), files=dict(zip(roles, files, strict=True)))
    with gpu_lock(str(predictor.device)):
        report = run_case(predictor, case, output, progress=progress_bar(case.id))
    for row in report.numbers["labels"].values():
        typer.echo(
            f"{row['name']:<24} {row['volume_ml']:>12.3f} ml{'  (cut by the border)' if row['truncated'] else ''}"
        )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(product_path(output, predictor.bundle, case.id, ".nii.gz"))


@app.command()
def batch(
    input: Annotated[Path, typer.Option(help="Folder of files, or a CSV manifest.")],
    bundle: BundleOption,
    output: OutputOption,
    ram: Annotated[str | None, typer.Option(help="Memory that may be used, for example 4G.")] = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 1,
    workers: Annotated[int, typer.Option(min=1, help="Cases at a time.")] = 1,
    retry: Annotated[str | None, typer.Option(help="Take up set-aside cases again: a reason code, or all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every input and product.")] = False,
    reprocess: Annotated[bool, typer.Option("--reprocess", help="Redo cases finished with an older bundle.")] = False,
    settle: Annotated[float, typer.Option(min=0, help="Files younger than this many seconds wait.")] = 60.0,
    follow: Annotated[bool, typer.Option("--follow", help="Follow links to folders.")] = False,
) -> None:
    """Segment what is due in an archive. Exit code 0: all well; 1: broken set-up; 3: cases stand set aside."""
    from flows.batch import run_batch

    code = run_batch(
        input=input,
        bundle=bundle,
        output=output,
        ram=ram,
        device=device,
        batch=batch_size,
        workers=workers,
        retry=retry,
        verify=verify,
        reprocess=reprocess,
        settle=settle,
        follow=follow,
        echo=typer.echo,
    )
    raise typer.Exit(code)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Run file (TOML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    register: Annotated[str | None, typer.Option(help="Register the bundle in MLflow under this name.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias for the registered version, for example champion.")] = None,
) -> None:
    """Train a network on a labelled cohort; ends with a bundle."""
    from pipelines.config import TrainRun
    from pipelines.tracking import register_model, track_training
    from pipelines.train import train as run_training

    settings = TrainRun.load(run)
    with track_training(settings.name, {"run_file": run, "network": settings.network}) as log:
        bundle = run_training(settings, resume=resume, log=log, progress=progress_bar(settings.name))
    typer.echo(f"bundle {bundle.title}: {bundle.folder}")
    if register:
        typer.echo(f"registered as {register} version {register_model(bundle, register, alias)}")


@app.command()
def evaluate(
    reference: Annotated[Path, typer.Argument(help="Folder of label files, or a manifest.")],
    prediction: Annotated[Path, typer.Argument(help="Folder of predicted label files (same ids).")],
    output: OutputOption,
) -> None:
    """Dice, NSD and HD95 (mm) of predictions against a reference, with intervals; JSON and CSV."""
    from pipelines.evaluate import evaluate as score
    from pipelines.evaluate import format_table

    typer.echo(format_table(score(reference, prediction, output=output)))


@models.command("list")
def list_registered() -> None:
    """Registered models with their versions and aliases."""
    from pipelines.tracking import list_models

    rows = list_models()
    for row in rows:
        typer.echo("  ".join(str(v) for v in row.values()))
    if not rows:
        typer.echo("no model is registered in this store")


@app.command()
def doctor() -> None:
    """Versions, devices, scan backend; what is missing and how to get it."""
    from flows.doctor import findings

    for name, text in findings():
        typer.echo(f"{name:<16} {text}")


@app.command()
def demo(folder: Annotated[Path, typer.Option(help="Where the demo lives.")] = Path("demo")) -> None:
    """The main job from end to end on a cohort made from a real brain: train, register, batch, evaluate."""
    from flows.demo import run_demo

    raise typer.Exit(run_demo(folder, typer.echo))


def progress_bar(title: str) -> Any:
    """A function (done, all) that draws a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal)
    task = bar.add_task(title, total=None)

    def update(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return update


def main() -> None:
    """Runs the command; an error made for users is one line and exit code 1."""
    prepare_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from medmamba.errors import MedMambaError

    try:
        app()
    except MedMambaError as error:
        typer.echo(f"medmamba: {error}", err=True)
        raise SystemExit(1) from None
