"""The command `medmamba`. Heavy imports live inside the commands: `--help` answers at once."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flows.config_file import ConfigOption
from flows.progress import progress
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
BatchOption = Annotated[
    int, typer.Option(min=0, help="Windows shown to the network at once; 0: what the memory takes.")
]
ModeOption = Annotated[
    str, typer.Option(help="windows: overlapping, blended; stream: the whole image in one piece, slab by slab.")
]
SegOption = Annotated[
    str, typer.Option(help="DICOM segmentation of cases from DICOM: labelmap, binary (older viewers), none.")
]


@app.command()
def predict(
    files: Annotated[
        list[Path],
        typer.Argument(help="The files or DICOM folders of one case, in the bundle's order; or one folder of cases."),
    ],
    bundle: BundleOption,
    output: OutputOption,
    ram: Annotated[str | None, typer.Option(help="Memory that may be used, for example 4G.")] = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 0,
    mode: ModeOption = "windows",
    dicom_seg: SegOption = "labelmap",
    config: ConfigOption = None,
) -> None:
    """Segment one case, or each of a folder: labels on its own grid, a picture, a report; for DICOM a DICOM SEG too."""
    from flows.gpu import gpu_lock
    from medmamba.errors import InputError
    from pipelines.cases.manifest import layout_of
    from pipelines.cases.state import STATE
    from pipelines.domains import domain_of, needed_bytes, scratch_bytes
    from pipelines.layouts.bids import describe
    from pipelines.report import peak_memory_mb
    from pipelines.serving.budget import fitting_batch, machine_bytes, memory_line, parse_bytes, require_memory
    from pipelines.serving.predict import Predictor
    from pipelines.tracking import resolve

    resolved = resolve(bundle, output / STATE / "models")
    domain, memory = domain_of(resolved.bundle.task), machine_bytes() if ram is None else parse_bytes(ram)
    cases = domain.cases_of(files, resolved.bundle.preprocessing.roles, output=output)
    needed, scratch = (of(resolved.bundle, cases, mode) for of in (needed_bytes, scratch_bytes))
    batch = batch_size or fitting_batch(resolved.bundle, needed, memory)
    typer.echo(memory_line(resolved.bundle, needed, scratch, mode, batch, memory), err=True)
    predictor = Predictor.load(resolved.bundle, device=device, batch=batch, mode=mode, dicom_seg=dicom_seg)
    refused = 0
    for case in cases:
        try:
            require_memory(case, needed_bytes(resolved.bundle, [case], mode), memory)
            with gpu_lock(str(predictor.device)), progress(case.id) as update:
                report = domain.predict(predictor, case, output, update)
        except InputError as error:
            if len(cases) == 1:
                raise
            refused += 1
            typer.echo(f"{case.id}: {error.code}: {error}", err=True)
            continue
        for line in domain.lines(report):
            typer.echo(line)
        for warning in report.warnings:
            typer.echo(f"warning: {warning}")
        for name in report.outputs:
            if not name.endswith(".png"):
                typer.echo(output / predictor.bundle.title / name)
    if layout_of(files[0]) == "BIDS":
        folder, names = output / predictor.bundle.title, predictor.task.written_names
        describe(folder, bundle=folder.name, source=files[0], names=names)
    typer.echo(f"memory at most {peak_memory_mb():.0f} MiB", err=True)
    if refused:
        raise typer.Exit(3)


@app.command()
def batch(
    input: Annotated[Path, typer.Option(help="Folder of files, or a CSV manifest.")],
    bundle: BundleOption,
    output: OutputOption,
    ram: Annotated[str | None, typer.Option(help="Memory that may be used, for example 4G.")] = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 0,
    workers: Annotated[int, typer.Option(min=1, help="Cases at a time.")] = 1,
    retry: Annotated[str | None, typer.Option(help="Take up set-aside cases again: a reason code, or all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every input and product.")] = False,
    reprocess: Annotated[bool, typer.Option("--reprocess", help="Redo cases finished with an older bundle.")] = False,
    settle: Annotated[float, typer.Option(min=0, help="Files younger than this many seconds wait.")] = 60.0,
    follow: Annotated[bool, typer.Option("--follow", help="Follow links to folders.")] = False,
    mode: ModeOption = "windows",
    dicom_seg: SegOption = "labelmap",
    config: ConfigOption = None,
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
        mode=mode,
        dicom_seg=dicom_seg,
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
    """Train a network on a labelled cohort; ends with a bundle.

    On several GPUs: torchrun --nproc-per-node N --no-python medmamba train RUN.toml
    """
    from pipelines.learning.change_run import load_run
    from pipelines.learning.parallel import is_first
    from pipelines.learning.train import train as run_training
    from pipelines.tracking import register_model, track_training

    settings = load_run(run)
    tracked = track_training(settings.name, {"run_file": run, "network": settings.network})
    with tracked if is_first() else nullcontext() as log, progress(settings.name) as update:
        bundle = run_training(settings, resume=resume, log=log, progress=update)
    if not is_first():
        return
    typer.echo(f"bundle {bundle.title}: {bundle.folder}")
    if register:
        typer.echo(f"registered as {register} version {register_model(bundle, register, alias)}")


@app.command("import-weights")
def import_weights(
    network: Annotated[str, typer.Argument(help="Name of a network, for example umamba.")],
    file: Annotated[Path, typer.Argument(help="Published weights: safetensors, or a torch file of plain tensors.")],
    contract: Annotated[Path, typer.Option(help="TOML: name, labels, [network] and [preprocessing] as in a run file.")],
    output: Annotated[Path, typer.Option(help="Folder of the bundle.")],
) -> None:
    """Make a bundle of published weights and the contract with the data that they were trained under."""
    from pipelines.config import Contract
    from pipelines.learning.weights import import_weights as make_bundle

    bundle = make_bundle(Contract.load(contract, architecture=network), file, output)
    typer.echo(f"bundle {bundle.title}: {bundle.folder}")


@app.command()
def evaluate(
    reference: Annotated[Path, typer.Argument(help="Folder of label files, a manifest, or a change data set.")],
    prediction: Annotated[Path, typer.Argument(help="Folder of predicted label files or change maps (same ids).")],
    output: OutputOption,
    ignore_label: Annotated[int | None, typer.Option(help="Value in the reference that is not scored.")] = None,
    config: ConfigOption = None,
) -> None:
    """Dice, NSD and HD95 (mm) of predictions against a reference, with intervals; JSON and CSV. Change maps against
    a change data set: F1, IoU, kappa, for semantic change SeK and F_scd under both protocols."""
    from pipelines.layouts.change import change_layout_of, read_layout

    if change_layout_of(reference) is not None:
        from pipelines.scoring.change_files import evaluate_maps

        typer.echo("\n".join(evaluate_maps(read_layout(reference), prediction, output=output).table()))
        return
    from pipelines.scoring.evaluate import evaluate as score
    from pipelines.scoring.evaluate import format_table

    typer.echo(format_table(score(reference, prediction, ignore=ignore_label, output=output)))


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(help="A labelled table or data set; with --bundle what a batch would get.")],
    output: Annotated[Path, typer.Option(help="Folder for the run file; with --bundle the batch's output.")],
    bundle: Annotated[str | None, typer.Option(help="Dry run: what a batch with this bundle would meet.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory that may be used, for example 8G.")] = None,
    mode: ModeOption = "windows",
    architecture: Annotated[str, typer.Option(help="The network to plan for.")] = "mamba_unet",
    folds: Annotated[int, typer.Option(min=2, help="Cross-validation folds, whole patients in each.")] = 5,
    fold: Annotated[int, typer.Option(min=0, help="The fold that this run holds out.")] = 0,
    config: ConfigOption = None,
) -> None:
    """A cohort's fingerprint and the run file that follows from it; with --bundle a dry run that loads no weights."""
    from pipelines.serving.budget import machine_bytes, parse_bytes

    memory = machine_bytes() if ram is None else parse_bytes(ram)
    if bundle is None:
        from pipelines.learning.plan import describe as told
        from pipelines.learning.plan import plan_cohort

        with progress(source.name) as update:
            made = plan_cohort(
                source, output, architecture=architecture, memory=memory, folds=folds, fold=fold, progress=update
            )
        typer.echo("\n".join([*told(made), f"medmamba train {output / 'run.toml'}"]))
        return
    from pipelines.cases.state import STATE
    from pipelines.domains import domain_of
    from pipelines.serving.forecast import describe, forecast
    from pipelines.tracking import resolve

    served = resolve(bundle, output / STATE / "models").bundle
    found = domain_of(served.task).find(source, served.preprocessing.roles, output=output, settle=0)
    with progress(source.name) as update:
        lines = describe(forecast(found.cases, served, output, memory=memory, mode=mode, progress=update))
    typer.echo("\n".join([*lines, *found.notes]))


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="A labelled table or data set, or a change data set's folder.")],
    layout: Annotated[
        str | None, typer.Option(help="Name of its layout; recognised by its folders unless given.")
    ] = None,
    order: Annotated[str | None, typer.Option(help="Order of its class ids: mambacd, open_cd, landsat_scd.")] = None,
    config: ConfigOption = None,
) -> None:
    """Every fault of a data set: a table, nnU-Net, BIDS, a MONAI list; or a change data set (LEVIR-CD, SECOND,
    Landsat-SCD, MambaCD). Exit code 1 with any fault."""
    from pipelines.cases.manifest import layout_of

    if layout is None and order is None and (dataset.is_file() or layout_of(dataset)):
        from pipelines.cases.check import check_dataset

        with progress(dataset.name) as update:
            cases, faults = check_dataset(dataset, progress=update)
        typer.echo("\n".join([*faults, f"{cases} cases, {len(faults)} faults"]))
        raise typer.Exit(1 if faults else 0)
    from pipelines.layouts.change import read_layout
    from pipelines.layouts.change_check import check as find_faults

    found = read_layout(dataset, layout=layout, order=order)
    typer.echo(found.describe())
    with progress(dataset.name) as update:
        findings = find_faults(found, progress=update)
    for finding in findings:
        typer.echo(finding.describe())
    if any(finding.fault for finding in findings):
        raise typer.Exit(1)
    typer.echo("no fault found")


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
def demo(
    job: Annotated[
        str, typer.Argument(help="volume (a cohort made from a real brain) or change (a pair of scenes).")
    ] = "volume",
    folder: Annotated[
        Path | None, typer.Option(help="Where the demo lives; demo, or demo-change, unless given.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """A job from end to end on made data: train, register, predict, compare with the truth."""
    from medmamba.errors import ConfigError

    if job == "volume":
        from flows.demo import run_demo

        raise typer.Exit(run_demo(folder or Path("demo"), typer.echo))
    if job == "change":
        from flows.demo_change import run_demo_change

        raise typer.Exit(run_demo_change(folder or Path("demo-change"), typer.echo))
    raise ConfigError(f"demo {job!r} unknown; known: volume, change")


def main() -> None:
    """Runs the command; an error made for users is one line and exit code 1."""
    prepare_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rasterio").setLevel(logging.ERROR)  # GDAL's remarks on a damaged file; the reason code says it
    from medmamba.errors import MedMambaError

    try:
        app()
    except MedMambaError as error:
        typer.echo(f"medmamba: {error}", err=True)
        raise SystemExit(1) from None
