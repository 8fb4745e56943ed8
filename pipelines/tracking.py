"""Figures of a batch in MLflow, and bundles in its model registry. The only room that imports mlflow.

Patient data stays out: a case is a keyed pseudonym there. A report holds every figure too, so that a failure here costs
nothing: what was not logged is logged by the next run. MLflow takes seconds to import, hence inside the functions.
"""

from __future__ import annotations

import fcntl
import hmac
import io
import logging
import os
import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import BundleError, ConfigError
from medmamba.files import hash_json
from pipelines.cases.state import STATE, Index
from pipelines.report import Report, code_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "medmamba-batch"
MODELS = "medmamba-models"
TRAINING = "medmamba-training"
BATCH = 1000  # the most metrics that MLflow takes in one call
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else what MLflow itself takes (`mlflow ui` shows it): `mlflow.db` in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client whose database exists: made by one process, others wait (two at once would break it)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    uri = uri or tracking_uri()
    with _alone(uri), _quiet():
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    if not uri.startswith("sqlite:///"):
        yield
        return
    name = f"medmamba-{os.getuid()}-{hash_json(uri)[:16]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment(client: MlflowClient, name: str) -> str:
    """Id of an experiment, made when missing; beside a SQLite database its artifacts lie in `mlartifacts`."""
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    uri = client.tracking_uri
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name).as_uri()
    return str(client.create_experiment(name, artifact_location=place))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One batch in MLflow."""

    client: MlflowClient
    id: str


def start_run(bundle: Bundle, settings: Mapping[str, Any]) -> Run:
    """Opens the run of a batch; `settings` become its parameters. Give no paths: they may name patients."""
    client = connect()
    tags = {"mlflow.runName": f"{bundle.title} {time.strftime('%Y-%m-%d %H:%M', time.gmtime())}", "bundle": bundle.id}
    run = client.create_run(experiment(client, EXPERIMENT), tags=tags)
    params = {"bundle": bundle.title, "code": code_version(), **settings}
    for name, value in params.items():
        client.log_param(run.info.run_id, name, value)
    return Run(client=client, id=run.info.run_id)


def log_reports(run: Run, reports: Sequence[Report], key: bytes) -> None:
    """Per-case figures (step = place in the sequence), counts per status and code, and the table that joins steps to
    pseudonyms. Raises what MLflow raises."""
    from mlflow.entities import Metric

    at = int(time.time() * 1000)
    metrics = [Metric(n, v, at, step) for step, r in enumerate(reports) for n, v in figures(r).items()]
    metrics += [Metric(name, float(n), at, 0) for name, n in counts(reports).items()]
    for start in range(0, len(metrics), BATCH):
        run.client.log_batch(run.id, metrics=metrics[start : start + BATCH])
    rows = {
        "case": [pseudonym(key, r.case) for r in reports],
        "step": list(range(len(reports))),
        "status": [r.status for r in reports],
        "code": [r.code or "" for r in reports],
        "warnings": [len(r.warnings) for r in reports],
    }
    if reports:
        run.client.log_table(run.id, data=rows, artifact_file="cases.json")


def end_run(run: Run, *, failed: bool = False) -> None:
    run.client.set_terminated(run.id, status="FAILED" if failed else "FINISHED")


def figures(report: Report) -> dict[str, float]:
    """The numbers of one report as MLflow metrics: seconds, memory, and what the task measured per label."""
    found = {n: float(report.run[n]) for n in ("seconds", "peak_memory_mb") if report.run.get(n) is not None}
    found |= {n: float(value) for n, value in report.numbers.get("figures", {}).items()}
    for row in report.numbers.get("labels", {}).values():
        label = re.sub(r"[^\w. -]+", "-", str(row["name"]))
        for name in ("volume_ml", "intensity_mean"):
            if row.get(name) is not None:
                found[f"{name}/{label}"] = float(row[name])
    return found


def counts(reports: Sequence[Report]) -> dict[str, int]:
    """How many cases were done and how many set aside, the latter also by reason code."""
    by_status = Counter(r.status for r in reports)
    by_code = Counter(r.code for r in reports if r.code)
    return {"cases/done": by_status["done"], "cases/set_aside": by_status["set_aside"]} | {
        f"set_aside/{code}": n for code, n in sorted(by_code.items())
    }


def untracked(index: Index, title: str, reports: Sequence[Report]) -> list[Report]:
    """Reports that no run has logged yet, those of an earlier night when MLflow failed included."""
    return [r for r in reports if index.tracked(title, r.case) != stamp(r)]


def stamp(report: Report) -> str:
    """Tells two reports of one case apart."""
    return f"{report.status} {report.key} {report.run.get('started', '')}"


def pseudonym_key(output: Path) -> bytes:
    """The secret that turns case ids of this output folder into pseudonyms; made once, readable by its owner only."""
    path = output / STATE / "pseudonym.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(handle)
        temporary.rename(path)
    return path.read_bytes()


def pseudonym(key: bytes, case: str) -> str:
    """The same case of the same output folder has the same name; without the key nobody can tell which it is."""
    return hmac.new(key, case.encode(), "sha256").hexdigest()[:16]


def register_model(
    bundle: Bundle, name: str, alias: str | None = None, metrics: Mapping[str, float] | None = None
) -> str:
    """Puts a bundle into the registry as `name`, returns its version; `alias` (such as "champion") then points at it.

    The model is code + safetensors + JSON: it loads with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, Schema, TensorSpec

    client = connect()
    rank = len(bundle.preprocessing.windowing.size)
    free = (-1,) * rank
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(bundle.preprocessing.channels), *free))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, bundle.classes, *free))]),
        params=ParamSchema([]),
    )
    run = client.create_run(experiment(client, MODELS), tags={"mlflow.runName": bundle.title, "bundle": bundle.id})
    with _quiet(), mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metrics({**checks_of(bundle), **dict(metrics or {})})
        for said, changed in reliability_of(bundle):
            mlflow.log_metric("reliability", changed, step=said)
        info = mlflow.pyfunc.log_model(
            name=re.sub(r"[^\w.-]+", "-", name),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"bundle": str(bundle.folder)},
            signature=signature,
            pip_requirements=requirements(),
        )
        version = str(mlflow.register_model(info.model_uri, name, tags={"bundle": bundle.id}).version)
    if alias:
        client.set_registered_model_alias(name, alias, version)
    return version


def checks_of(bundle: Bundle) -> dict[str, float]:
    """What a bundle's card says of the checks its model went through, and its threshold (change models have such)."""
    threshold = {"threshold": float(bundle.task["threshold"])} if "threshold" in bundle.task else {}
    return {f"check_{name}": float(value) for name, value in bundle.card.get("checks", {}).items()} | threshold


def reliability_of(bundle: Bundle) -> list[tuple[int, float]]:
    """The reliability diagram on a change bundle's card: percent that the network says, share that did change; as the
    metric `reliability` its chart in MLflow, a straight line where the network is honest."""
    told = bundle.card.get("validation")
    rows = told.get("reliability", ()) if isinstance(told, dict) else ()  # of segmentations it is a table of labels
    return [(round(100 * row["confidence"]), float(row["changed"])) for row in rows if row["pixels"]]


def requirements() -> list[str]:
    """What a server needs to run a registered model, at the versions in use here."""
    from importlib.metadata import version

    return [
        f"{package}=={version(package).partition('+')[0]}" for package in ("medmamba", "torch", "numpy", "safetensors")
    ]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A bundle at hand; `model` and `version` when it came from the registry."""

    bundle: Bundle
    model: str | None = None
    version: str | None = None


def resolve(reference: str, cache: Path) -> Resolved:
    """A bundle's folder, or `models:/NAME@ALIAS` or `models:/NAME/VERSION` downloaded below `cache` (once a version).

    Raises ConfigError for a name the registry does not know, BundleError when what comes is not what was registered.
    """
    if not reference.startswith("models:/"):
        return Resolved(bundle=Bundle.load(Path(reference)))
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"bundle {reference!r}: expected a folder, models:/NAME@ALIAS or models:/NAME/VERSION")
    client = connect()
    from mlflow.exceptions import MlflowException

    name = match["name"]
    try:
        found = client.get_model_version_by_alias(name, match["alias"]) if match["alias"] else None
        found = found or client.get_model_version(name, match["version"])
        version, wanted = str(found.version), found.tags.get("bundle")
        bundle = Bundle.load(_download(client, name, version, cache))
    except MlflowException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{reference}: {text} (registry {client.tracking_uri}; `medmamba models list`)") from None
    if wanted and bundle.id != wanted:
        raise BundleError(f"{reference}: bundle {bundle.id[:8]} came, {wanted[:8]} was registered; register it again")
    return Resolved(bundle=bundle, model=name, version=version)


def _download(client: MlflowClient, name: str, version: str, cache: Path) -> Path:
    """The bundle of a model version as a folder, downloaded when it is not there whole."""
    from mlflow.artifacts import download_artifacts

    place = cache / hash_json([client.tracking_uri, name, version])[:16]
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        with _quiet():
            download_artifacts(
                artifact_uri=f"models:/{name}/{version}", dst_path=str(place), tracking_uri=client.tracking_uri
            )
        (place / "done").touch()
    found = sorted(place.glob("**/bundle.json"))
    if not found:
        raise BundleError(
            f"models:/{name}/{version}: holds no bundle; register it with `medmamba train` or the Python API"
        )
    return found[0].parent


def list_models() -> list[dict[str, str]]:
    """Every registered model version: name, version, aliases, bundle, created (UTC)."""
    client = connect()
    rows = []
    for model in client.search_registered_models():
        by_version: dict[str, list[str]] = {}
        for alias, version in client.get_registered_model(model.name).aliases.items():
            by_version.setdefault(str(version), []).append(alias)
        for version in client.search_model_versions(f"name = '{model.name}'"):
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(version.creation_timestamp / 1000))
            aliases = ", ".join(sorted(by_version.get(str(version.version), [])))
            bundle = version.tags.get("bundle", "")[:8]
            rows.append(
                {
                    "name": model.name,
                    "version": str(version.version),
                    "aliases": aliases,
                    "bundle": bundle,
                    "created": created,
                }
            )
    return sorted(rows, key=lambda r: (r["name"], -int(r["version"])))


def declare_model() -> None:
    """Called by the served model's code: arrays (B, C, *space) float32 in, scores (B, K, *space) float32 out.

    Channels in the bundle's order, axes and spacing as the network wants them (an array has no geometry).
    """
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class Served(PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            from pipelines.networks import NETWORKS

            self.bundle = Bundle.load(Path(context.artifacts["bundle"]))
            self.network = self.bundle.build(NETWORKS)

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints as a schema
            return np.stack([self._one(np.asarray(array, dtype=np.float32)) for array in model_input])

        def _one(self, array: np.ndarray) -> np.ndarray:
            from medmamba.grid import Grid
            from medmamba.infer import infer
            from medmamba.sample import Image
            from medmamba.source import ArraySink, ArraySource

            contract = self.bundle.preprocessing
            spacing = contract.spacing or (1.0,) * (array.ndim - 1)
            grid = Grid(array.shape[1:], np.diag([*spacing, 1.0]))
            names = [str(i) for i in range(len(contract.channels))]  # an array has channels, not files with volumes
            channels = tuple(replace(c, role=n, volume=None) for c, n in zip(contract.channels, names, strict=True))
            sources = {n: ArraySource(Image(array[i : i + 1], grid, (n,))) for i, n in enumerate(names)}
            sink = ArraySink(self.bundle.classes, grid.shape)
            seen = replace(contract, channels=channels).forward(sources)
            infer(self.network, seen, sink, classes=self.bundle.classes, windowing=contract.windowing)
            return sink.array

    set_model(Served())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's advice on type hints and examples, its progress bars and its own messages on stderr."""
    import warnings

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    theirs = logging.getLogger("mlflow")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(level)


@contextmanager
def track_training(name: str, parameters: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A run for one training; yields `log(metrics, step)`, which buffers. A failure of MLflow is a warning, no more."""
    pending: list[tuple[str, float, int]] = []
    try:
        client = connect()
        run_id = client.create_run(experiment(client, TRAINING), tags={"mlflow.runName": name}).info.run_id
        for key, value in parameters.items():
            client.log_param(run_id, key, str(value)[:500])
    except Exception as error:
        logger.warning("MLflow is not reached, training goes on without it: %s", error)
        yield lambda metrics, step: None
        return

    def flush() -> None:
        from mlflow.entities import Metric

        moment = int(time.time() * 1000)
        try:
            for first in range(0, len(pending), BATCH):
                part = pending[first : first + BATCH]
                client.log_batch(run_id, metrics=[Metric(k, v, moment, step) for k, v, step in part])
        except Exception as error:
            logger.warning("MLflow did not take %d figures: %s", len(pending), error)
        pending.clear()

    def log(metrics: Mapping[str, float], step: int) -> None:
        pending.extend((key, float(value), step) for key, value in metrics.items())
        if len(pending) >= BATCH:
            flush()

    state = "FAILED"
    try:
        yield log
        state = "FINISHED"
    finally:
        flush()
        with suppress(Exception):
            client.set_terminated(run_id, status=state)
