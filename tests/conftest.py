"""What many tests share: the folder of real files beside the checkout (absent in a bare clone) and seeds."""

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # sums in one order; and tiny tensors on a busy machine are many times quicker
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that tests start

hypothesis.settings.register_profile("house", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real files; tests that read it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MEDMAMBA_SHARED", default))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real files at {folder}")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
