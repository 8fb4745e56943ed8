"""Two processes under torchrun learn what one learns from twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from medmamba.bundle import Bundle
from pipelines.config import TrainRun
from pipelines.learning.train import train
from pipelines.networks import NETWORKS
from tests.pipelines.cohort_maker import run_values, write_cohort

DRIVER = """
import json, sys
from pipelines.config import TrainRun
from pipelines.learning.train import train
train(TrainRun.check(json.load(open(sys.argv[1]))), log=lambda figures, step: sys.stdout.write(f"epoch at {step}\\n"))
"""


def test_two_processes_equal_one_with_double_batch(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", cases=3)
    values = {
        **run_values(manifest, tmp_path / "two"),
        "batch": 2,
        "epochs": 1,
        "steps_per_epoch": 3,
        "validation_share": 0,
        "lr": 1e-4,
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [*torchrun, *meeting, str(tmp_path / "driver.py"), str(tmp_path / "run.json")]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["epoch at 3", ""]  # the first process speaks for all
    one = train(TrainRun.check({**values, "output": str(tmp_path / "one"), "batch": 4}))
    weights = Bundle.load(tmp_path / "two/bundle").build(NETWORKS).state_dict()
    for name, value in one.build(NETWORKS).state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
