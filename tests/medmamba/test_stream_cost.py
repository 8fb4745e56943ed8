"""Memory and scratch of a sweep told beforehand, against what a real one held."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medmamba import stream as stream_module
from medmamba.memory import LiveBytes, without_data
from medmamba.scratch import Journal
from medmamba.stream_cost import stream_cost
from tests.medmamba.test_stream import make, streamed


def network(kind: str) -> nn.Module:
    if kind == "steps":
        return make(widths=(4, 8), mixer="s6", in_channels=1)
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU())
    return nn.Sequential(norm, nn.Conv3d(4, 3, 3, padding=1)).eval()


@pytest.mark.parametrize("shape", [(24, 16, 16), (36, 24, 20), (48, 32, 32)])
@pytest.mark.parametrize("kind", ["steps", "norms"])
def test_a_sweep_takes_what_was_told(
    kind: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stream_cost(without_data(lambda: network(kind)), 1, shape, 12)
    peaks, held = list[int](), list[int]()
    slab, add = stream_module._Runner._slab, Journal.add

    def watched(runner: Any, *arguments: Any) -> Any:
        with LiveBytes() as live:
            found = slab(runner, *arguments)
        peaks.append(live.peak())
        return found

    def counted(journal: Journal, *arguments: Any) -> None:
        held.append(sum(file.stat().st_size for file in journal.folder.glob("*.map")))
        add(journal, *arguments)

    monkeypatch.setattr(os, "fdatasync", lambda file: None)
    monkeypatch.setattr(stream_module._Runner, "_slab", watched)
    monkeypatch.setattr(Journal, "add", counted)
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    streamed(network(kind), array, tmp_path, 12)
    assert max(peaks) == pytest.approx(told.slab, rel=0.15)
    assert max(held) == pytest.approx(told.scratch, rel=0.02)
