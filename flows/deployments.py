"""Flows that a Prefect server starts by the clock; one line each in FLOWS."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.settings import prepare_environment

prepare_environment()

from prefect import flow  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.batch import BROKEN, run_batch  # noqa: E402
from flows.orchestrate import submit_all  # noqa: E402

threads: Any = ThreadPoolTaskRunner(max_workers=16)


@flow(name="medmamba-nightly", task_runner=threads, persist_result=False)
def nightly(
    input: Path,
    bundle: str,
    output: Path,
    ram: str | None = None,
    device: str = "auto",
    batch: int = 0,
    workers: int = 1,
    retry: str | None = None,
    verify: bool = False,
    reprocess: bool = False,
    settle: float = 60.0,
    follow: bool = False,
    dicom_seg: str = "labelmap",
    mode: str = "windows",
) -> int:
    """`medmamba batch` as a flow of its own, with the parameters of `flows.batch.Settings`.

    Fails when the set-up is broken, returns the exit code otherwise.
    """
    asked = dict(locals())  # the parameters, as nothing else has a name yet
    said: list[str] = []
    code = run_batch(echo=said.append, runner=submit_all, **asked)
    logging.getLogger("medmamba").info("\n".join(said))
    if code == BROKEN:
        raise RuntimeError(said[-1])
    return code


FLOWS = {"nightly": nightly}


def serve(name: str, parameters: Mapping[str, Any], cron: str) -> None:
    """Keeps a flow of FLOWS running by the clock (cron, UTC), one run at a time, until stopped by SIGTERM."""
    FLOWS[name].serve(name=name, parameters=dict(parameters), cron=cron, limit=1)
