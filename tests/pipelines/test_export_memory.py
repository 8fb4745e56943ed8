"""What follows the network takes memory by the voxel, not by the class: measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MUST, FREE = 8, 64 * 2**20  # bytes a voxel, and what libraries may take beside them


def peak(classes: int, shape: tuple[int, int, int], kind: str) -> int:
    """Bytes at most above those resident after a warm-up, from scores to the last file (`benchmarks/inference.py`)."""
    command = [sys.executable, str(ROOT / "benchmarks" / "inference.py"), "--child"]
    command.append(json.dumps(["export", classes, shape, kind]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=500)
    return int(json.loads(done.stdout)["peak"])


def test_classes_cost_nothing() -> None:
    """117 classes at once would be 600 MB here."""
    shape = (32, 200, 200)
    assert peak(117, shape, "cleaned") <= MUST * np.prod(shape) + FREE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "cleaned"])
def test_a_voxel_more_costs_eight_bytes_at_most(kind: str) -> None:
    small, large = (80, 320, 320), (240, 320, 320)
    more = peak(5, large, kind) - peak(5, small, kind)
    assert more <= MUST * (np.prod(large) - np.prod(small))
