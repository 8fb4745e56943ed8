"""MLflow: figures without patient names, models without pickle."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medmamba.bundle import Bundle
from medmamba.errors import BundleError, ConfigError
from pipelines import tracking
from pipelines.cases.state import Index
from pipelines.report import Report
from tests.ways.tiny import make_bundle

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and its web framework's own


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a database made once for this file (its migrations take seconds)."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    tracking.connect(uri)
    return uri


@pytest.fixture(autouse=True)
def address(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("models") / "bundle")


def report(case: str, code: str | None = None) -> Report:
    row = {"name": "liver/left", "volume_ml": 12.5, "intensity_mean": None}
    return Report(
        case=case,
        key="k",
        status="set_aside" if code else "done",
        bundle={},
        inputs={"ct": {"path": f"/archive/{case}.nii", "size": 1, "sha256": "0"}},
        numbers={} if code else {"labels": {"1": row}},
        code=code,
        message=f"{case} is bad" if code else None,
        run={"seconds": 2.0, "started": "2026-01-01T00:00:00+00:00"},
    )


def test_figures_arrive_and_names_do_not(bundle: Bundle, tmp_path: Path) -> None:
    reports = [report("Smith-John"), report("Doe-Jane", "corrupt_file"), report("Roe-Ann", "corrupt_file")]
    run = tracking.start_run(bundle, {"workers": 1})
    tracking.log_reports(run, reports, tracking.pseudonym_key(tmp_path))
    tracking.end_run(run)
    stored = run.client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    metrics = stored.data.metrics
    assert metrics["cases/done"] == 1
    assert metrics["set_aside/corrupt_file"] == 2
    assert metrics["volume_ml/liver-left"] == 12.5
    assert "intensity_mean/liver-left" not in metrics  # undefined is absent, not 0
    written = "".join(
        p.read_text() for p in Path(run.client.download_artifacts(run.id, "", str(tmp_path))).rglob("*.json")
    )
    everything = written + str(stored.to_dictionary())
    assert tracking.pseudonym(tracking.pseudonym_key(tmp_path), "Smith-John") in written
    assert not [name for name in ("Smith", "Doe", "Roe", "archive") if name in everything]


def test_more_figures_than_one_call_takes(bundle: Bundle, tmp_path: Path) -> None:
    run = tracking.start_run(bundle, {})
    tracking.log_reports(run, [report(f"c{i}") for i in range(600)], b"key")  # 1200 metrics, MLflow takes 1000 a call
    assert len(run.client.get_metric_history(run.id, "seconds")) == 600


def test_the_key_is_secret_and_stays(tmp_path: Path) -> None:
    key = tracking.pseudonym_key(tmp_path)
    assert tracking.pseudonym_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / ".medmamba" / "pseudonym.key").stat().st_mode) == 0o600
    assert tracking.pseudonym(key, "a") == tracking.pseudonym(key, "a") != tracking.pseudonym(b"other", "a")


def test_what_was_logged_is_not_logged_again(tmp_path: Path) -> None:
    with Index(tmp_path) as index:
        reports = [report("a"), report("b")]
        assert tracking.untracked(index, "t", reports) == reports
        index.set_tracked("t", {"a": tracking.stamp(reports[0])})
        assert tracking.untracked(index, "t", reports) == reports[1:]
        assert tracking.untracked(index, "t", [report("a", "killed")]) != []


def test_a_bundle_goes_through_the_registry(bundle: Bundle, tmp_path: Path) -> None:
    trained = replace(bundle, card={"validation": [{"label": 1, "dice": 0.5}]})  # as training leaves it
    version = tracking.register_model(trained, "tiny", "champion", {"dice": 0.5})
    found = tracking.resolve("models:/tiny@champion", tmp_path)
    assert (found.bundle.id, found.model, found.version) == (bundle.id, "tiny", version)
    assert tracking.resolve(f"models:/tiny/{version}", tmp_path).bundle.folder == found.bundle.folder
    assert tracking.resolve(str(bundle.folder), tmp_path).model is None
    rows = [r for r in tracking.list_models() if r["name"] == "tiny"]
    assert (rows[0]["version"], rows[0]["aliases"], rows[0]["bundle"]) == (version, "champion", bundle.id[:8])
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pth", ".pt"}
    with pytest.raises(ConfigError, match="no_such_model"):
        tracking.resolve("models:/no_such_model@champion", tmp_path)
    with pytest.raises(ConfigError, match="expected a folder"):
        tracking.resolve("models:/tiny", tmp_path)
    weights = found.bundle.folder / found.bundle.weights[0]
    weights.write_bytes(make_bundle(tmp_path / "other", seed=1).folder.joinpath("weights_0.safetensors").read_bytes())
    with pytest.raises(BundleError, match="was registered"):
        tracking.resolve("models:/tiny@champion", tmp_path)


def test_a_registered_model_predicts_an_array(bundle: Bundle) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    tracking.register_model(bundle, "served", "champion")
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    model = mlflow.pyfunc.load_model("models:/served@champion")
    for shape in ((1, 1, 12, 12, 12), (2, 1, 9, 14, 11)):
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        scores = model.predict(images)
        assert scores.shape == (shape[0], 3, *shape[2:])
        assert np.isfinite(scores).all()
    with pytest.raises(MlflowException):
        model.predict(np.zeros((1, 2, 12, 12, 12), dtype=np.float32))
