"""Predicts a pair and is killed (SIGKILL) at its n-th window, for some n; then predicts it again. A process that forks.

Usage: python -m tests.ways.kill_pair_driver ROOT N... Writes ROOT/out<n>, prints one JSON list of {n, signal, left
(files of the case after the kill), windows (seen by the second run)}; out0 was never killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from medmamba.bundle import Bundle
from pipelines.domains import domain_of
from pipelines.networks import NETWORKS
from pipelines.report import code_version
from pipelines.serving.predict import Predictor
from tests.ways.tiny_pair import DIFFERENCE, Difference, make_bundle, write_pair

WINDOW = 32  # of a scene of 96 x 120: 5 rows of 7 windows


def run(bundle: Bundle, files: list[Path], output: Path, last: int, log: Path) -> None:
    """One process: dies when its network has seen `last` windows (0: never); how many it saw goes to `log`."""
    seen = 0

    class Counting(Difference):
        def forward(self, x: Any) -> Any:
            nonlocal seen
            seen += len(x)
            if last and seen >= last:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)

    NETWORKS[DIFFERENCE] = Counting
    domain = domain_of(bundle.task)
    (case,) = domain.cases_of(files, bundle.preprocessing.roles, output=output)
    domain.predict(Predictor.load(bundle, device="cpu"), case, output, None)
    log.write_text(str(seen))


def fork(*job: Any) -> int:
    """The signal that ended a child doing `run(*job)`; 0 when it ended well."""
    child = os.fork()
    if child == 0:
        code = 70  # an error: the child must not go on as its parent
        try:
            run(*job)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(root: Path, kills: list[int]) -> None:
    torch.set_num_threads(1)
    bundle, files, log = make_bundle(root / "bundle", window=WINDOW), list(write_pair(root)), root / "windows"
    code_version(), domain_of(bundle.task)  # what every child would fetch and import for itself
    told = []
    for n in kills:
        output = root / f"out{n}"
        died = fork(bundle, files, output, n, log)
        left = sorted(p.name for p in (output / bundle.title).glob("a*"))
        again = fork(bundle, files, output, 0, log) if died else 0
        told.append({"n": n, "signal": died, "again": again, "left": left, "windows": int(log.read_text())})
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])
