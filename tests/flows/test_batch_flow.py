"""The batch as people run it: under Prefect's own server, logged in MLflow. The server starts once."""

from __future__ import annotations

import errno
import inspect
import sqlite3
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from flows.batch import ASIDE, WELL, Settings, run_batch
from flows.settings import prepare_environment
from pipelines import tracking
from pipelines.report import Report
from pipelines.serving import process
from tests.ways.tiny import make_bundle, write_volume

pytestmark = [pytest.mark.flows, pytest.mark.filterwarnings("ignore")]  # warnings of Prefect's and MLflow's own code


@pytest.fixture(scope="session")
def prefect_db() -> Iterator[None]:
    prepare_environment()
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    quick = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with prefect_test_harness(server_startup_timeout=180), temporary_settings(quick):
        yield


def test_batch_under_prefect_and_mlflow(prefect_db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import get_client

    from flows import orchestrate

    for name in "abc":
        write_volume(tmp_path / "in" / f"{name}.nii", ord(name))
    write_volume(tmp_path / "in" / "flat.nii", constant=True)
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(orchestrate, "RETRY_AFTER_SECONDS", [0.0, 0.0])
    real, started, said = process.predict, [], []

    def stuttering(predictor: Any, case: Any, output: Path, progress: Any = None) -> Report:
        started.append(case.id)
        if case.id == "b" and started.count("b") < 3:
            raise OSError(errno.EIO, "disk stutters")
        if case.id == "c" and started.count("c") < 9:
            raise OSError(errno.EIO, "disk is broken")
        return real(predictor, case, output, progress)

    monkeypatch.setattr(process, "predict", stuttering)
    asked = {
        "input": tmp_path / "in",
        "bundle": str(bundle.folder),
        "output": tmp_path / "out",
        "settle": 0,
        "workers": 2,
    }
    assert run_batch(echo=said.append, **asked) == ASIDE
    assert (started.count("a"), started.count("b"), started.count("c"), started.count("flat")) == (1, 3, 3, 1)
    codes = {p.stem for p in (tmp_path / "out" / bundle.title / "set_aside").glob("*.json")}
    assert codes == {"c", "flat"}  # c went aside after its last try, as internal_error
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    assert [r.state.name for r in runs if r.state] == ["Completed"]
    stored = tracking.connect().search_runs(
        [tracking.connect().get_experiment_by_name(tracking.EXPERIMENT).experiment_id]
    )
    assert len(stored) == 1
    metrics = stored[0].data.metrics
    assert (metrics["cases/done"], metrics["set_aside/empty_image"], metrics["set_aside/internal_error"]) == (2, 1, 1)
    report = Report.load(tmp_path / "out" / bundle.title / "a_dseg.json")
    assert report is not None
    assert report.run["mlflow_run"] == stored[0].info.run_id

    monkeypatch.setattr(process, "predict", real)
    assert run_batch(echo=said.append, retry="internal_error", **asked) == ASIDE
    assert "1 done, 0 set aside" in " ".join(said)
    (tmp_path / "in" / "flat.nii").unlink()
    assert run_batch(echo=said.append, **asked) == WELL


def test_figures_wait_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.work import run_in_order

    write_volume(tmp_path / "in" / "a.nii")
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "broken.db").write_bytes(b"no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/broken.db")
    said: list[str] = []
    asked = {"input": tmp_path / "in", "bundle": str(bundle.folder), "output": tmp_path / "out", "settle": 0}
    assert run_batch(echo=said.append, runner=run_in_order, **asked) == WELL
    assert any("the next run logs them" in line for line in said)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert run_batch(echo=said.append, runner=run_in_order, **asked) == WELL
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        rows = base.execute("select value from latest_metrics where key = 'cases/done'").fetchall()
    assert rows == [(1.0,)]


def test_the_gpu_limit_is_made_once_and_kept(prefect_db: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.gpu import LIMIT, create_limit, gpu_slot

    create_limit()
    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(LIMIT, _slots(3))
    create_limit()
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(LIMIT).limit == 3
    with gpu_slot("a-gpu-of-tests"), get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1


def _slots(limit: int) -> Any:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    return GlobalConcurrencyLimitUpdate(limit=limit)


def test_the_flow_of_a_server_does_what_the_command_does(
    prefect_db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.deployments import nightly

    of_flow = {name: p.default for name, p in inspect.signature(nightly.fn).parameters.items()}
    of_command = {f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(Settings)}
    assert of_flow == of_command
    write_volume(tmp_path / "in" / "a.nii")
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    place = {"input": tmp_path / "in", "output": tmp_path / "out", "settle": 0}
    assert nightly(bundle=str(bundle.folder), **place) == WELL
    assert (tmp_path / "out" / bundle.title / "a_dseg.nii.gz").exists()
    with pytest.raises(RuntimeError, match="no-bundle"):
        nightly(bundle=str(tmp_path / "no-bundle"), **place)
