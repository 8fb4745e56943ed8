"""The environment that Prefect and MLflow read at import: quiet, offline, no pickle. What is set already stays."""

from __future__ import annotations

import os

DEFAULTS = {
    "DO_NOT_TRACK": "true",  # Prefect takes 1, true and yes; MLflow only the word
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away must not hold the batch for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # the first makes a database; 20 s fail when busy
}


def prepare_environment() -> None:
    """Call before prefect or mlflow is imported. PREFECT_HOME, PREFECT_API_URL, MLFLOW_TRACKING_URI are the user's."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
