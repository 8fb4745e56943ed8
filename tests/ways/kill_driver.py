"""Runs a batch and dies at its n-th durable step, for every n; then runs it again. A process of its own that forks.

Usage: python -m tests.ways.kill_driver ROOT. Reads ROOT/in and ROOT/bundle; writes ROOT/out<n>, prints one JSON list of
{n, step, finished (before the second run), redone (by the second run), codes}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import medmamba.files
from flows import batch
from flows.work import Work, run_in_order
from medmamba.files import write_bytes
from pipelines.serving import products

KILLED = 9


def run(root: Path, output: Path, done: list[str] | None = None) -> int:
    """One batch without Prefect and MLflow; ids of the cases it ran go to `done`."""

    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    def runner(work: Work, workers: int) -> None:
        run_in_order(work, workers)
        if done is not None:
            done.extend(work.reports)

    batch.start_run = away
    products.preview_png = lambda path, *_: write_bytes(path, path.name.encode())  # drawing would take most of the time
    settings = {"input": root / "in", "bundle": str(root / "bundle"), "output": output, "settle": 0}
    return batch.run_batch(echo=lambda _: None, runner=runner, **settings)


def fork(job: object) -> int:
    """Exit status of `job()` in a child."""
    child = os.fork()
    if child == 0:
        code = 70  # an error: the child must not go on as its parent
        try:
            code = job()  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(root: Path, output: Path, n: int) -> bool:
    """Runs until the n-th durable step; False when the run ended before."""
    count = 0

    def step(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == n:
            (root / "step").write_text(f"{name} {path.name}")
            os._exit(KILLED)

    def job() -> int:
        medmamba.files.step = step
        return run(root, output)

    return fork(job) == KILLED


def again(root: Path, output: Path) -> dict[str, object]:
    """The run after the kill."""
    finished = sorted(p.name.removesuffix("_dseg.json") for p in output.glob("*/*_dseg.json"))

    def job() -> int:
        done: list[str] = []
        code = run(root, output, done)
        (root / "done.json").write_text(json.dumps(sorted(done)))
        return code

    code = fork(job)
    return {"finished": finished, "redone": json.loads((root / "done.json").read_text()), "code": code}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    run(root, root / "whole")  # what every child would fetch and import for itself is there before the first fork
    told: list[dict[str, object]] = []
    n = 1
    while killed_at(root, root / f"out{n}", n):
        told.append({"n": n, "step": (root / "step").read_text(), **again(root, root / f"out{n}")})
        n += 1
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
