"""The due cases under Prefect: one flow, one task a chunk, bounded workers, no subflows, no results kept by Prefect."""

from __future__ import annotations

from threading import Semaphore
from typing import Any

from flows.gpu import create_limit, gpu_slot
from flows.settings import prepare_environment
from flows.work import Work

RETRY_AFTER_SECONDS = [5.0, 30.0]


def run_in_flow(work: Work, workers: int) -> None:
    """Starts the flow `medmamba-batch` and waits for its end."""
    prepare_environment()
    from prefect import flow
    from prefect.task_runners import ThreadPoolTaskRunner

    threads: Any = ThreadPoolTaskRunner(max_workers=workers)

    @flow(name="medmamba-batch", task_runner=threads, persist_result=False)
    def batch(bundle: str, cases: int) -> None:
        submit_all(work, workers)

    batch(bundle=work.place.bundle.title, cases=len(work.items))


def submit_all(work: Work, workers: int) -> None:
    """Inside a flow: a task a chunk, at most `workers` at a time. Tasks are tried again only for a passing OSError."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.runtime import task_run

    @task(
        name="cases",
        retries=len(RETRY_AFTER_SECONDS),
        retry_delay_seconds=RETRY_AFTER_SECONDS,
        retry_condition_fn=_passing,
        persist_result=False,
        cache_policy=NO_CACHE,
    )
    def cases(ids: list[str]) -> None:
        work.run(ids, last=(task_run.run_count or 1) > len(RETRY_AFTER_SECONDS), slot=gpu_slot)

    if work.place.predictor.device.type != "cpu":
        create_limit()
    free = Semaphore(workers)
    futures = set()
    for chunk in work.chunks():
        free.acquire()
        future = cases.submit(chunk)
        futures.add(future)
        future.add_done_callback(lambda _: free.release())
        futures = {f for f in futures if not f.state.is_final()}
    for future in futures:
        future.wait()


def _passing(task: Any, run: Any, state: Any) -> bool:
    """Whether a failed task may be mended by time: `Work.run` raises OSError for nothing else."""
    return isinstance(state.result(raise_on_failure=False), OSError)
