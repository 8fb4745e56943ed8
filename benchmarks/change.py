"""Change learned from scratch on a few LEVIR-CD crops: `python benchmarks/change.py [--seconds 200] [--only NAME ...]`.

The published sample of LEVIR-CD: three pairs of 256 x 256 to learn from (one shows no change), one to choose the
threshold on, two to score; the folder is `data/change_levir` of the shared data beside the project (MEDMAMBA_SHARED).
Every network gets the same CPU seconds in the production loop: as many steps as fit, told beside; the same patches,
augmentation, loss, optimizer and schedule. Intervals are drawn over the blocks of 64 x 64 of the two test pairs, and so
is the difference to the plain Siamese U-Net, pair by pair. Two crops say nothing about LEVIR-CD: compare the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

from medmamba.layers.change_pair import split_dates
from pipelines.learning.change_run import ChangeRun
from pipelines.learning.train import train
from pipelines.networks import NETWORKS
from pipelines.scoring.change_evaluate import map_pair
from pipelines.scoring.change_metrics import ChangeTally, paired_difference
from pipelines.serving.predict import Predictor

SHARED = Path(os.environ.get("MEDMAMBA_SHARED", Path(__file__).parents[2] / "shared"))
WIDTHS = (16, 32, 64, 128)
SIAMESE = "siamese_unet"
PAIR = {"depths": [1, 1, 1, 1], "widths": [16, 32, 64, 128], "width": 24, "drop_path": 0.0}
BLOCK, TIMED = 64, 5  # cells a side of what the bootstrap draws; steps by which the cost of one is measured
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain Siamese U-Net (FC-Siam-diff)": (SIAMESE, {}),
    "reversible Mamba U-Net, two dates": (
        "mamba_unet",
        {"widths": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "mixer_from": 2},
    ),
    "MambaBCD, small": ("mambabcd", PAIR),
    "AWMambaBCD, small": ("awmambabcd", PAIR),
}


class SiameseUNet(nn.Module):
    """FC-Siam-diff (Daudt et al., 2018): one encoder for both dates, the decoder gets the absolute differences.

    (B, 2C, H, W) -> (B, K, H, W); sides must be multiples of 8.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.channels = int(config["in_channels"])
        wide = (self.channels // 2, *WIDTHS)
        self.down = nn.ModuleList(block(a, b) for a, b in pairwise(wide))
        self.up = nn.ModuleList(block(a + b, b) for a, b in zip(WIDTHS[:0:-1], WIDTHS[-2::-1]))
        self.head = nn.Conv2d(WIDTHS[0], int(config["out_channels"]), 1)

    def forward(self, pair: Tensor) -> Tensor:
        maps = [self.encode(date) for date in split_dates(pair, self.channels)]
        *skips, x = [(one - other).abs() for one, other in zip(*maps)]
        for skip, up in zip(reversed(skips), self.up):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear"), skip], dim=1))
        scores: Tensor = self.head(x)
        return scores

    def encode(self, x: Tensor) -> list[Tensor]:
        """Maps of every level, the finest first."""
        maps = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            maps.append(x)
        return maps


def block(inside: int, outside: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with batch norm."""
    layers: list[nn.Module] = []
    for width in (inside, outside):
        layers += [nn.Conv2d(width, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


def siamese(settings: Mapping[str, Any]) -> nn.Module:
    """As the table of networks builds it."""
    return SiameseUNet(settings)


class Timed(Exception):
    """Enough steps were seen."""


def run_of(name: str, data: Path, folder: Path, *, steps: int, seed: int) -> ChangeRun:
    """The run file of a contender."""
    architecture, network = CONTENDERS[name]
    return ChangeRun.check(
        {
            **{"name": "bench", "architecture": architecture, "network": network, "dataset": str(data)},
            **{"output": str(folder), "epochs": 1, "steps_per_epoch": steps, "batch": 4, "lr": 3e-3, "seed": seed},
            **{"warmup_steps": steps // 10, "foreground_share": 0.7, "device": "cpu"},
            "preprocessing": {"window": [96, 96]},
        }
    )


def seconds_of_a_step(run: ChangeRun) -> float:
    """CPU seconds, after the first step."""
    began: list[float] = []

    def seen(done: int, of: int) -> None:
        began.append(time.process_time())
        if done > TIMED:
            raise Timed

    with suppress(Timed):
        train(run, progress=seen)
    return (began[-1] - began[0]) / TIMED


def score(name: str, data: Path, folder: Path, *, seconds: float, seed: int) -> dict[str, Any]:
    """Trains one contender for so many CPU seconds and scores it on the test pairs."""
    steps = round(seconds / seconds_of_a_step(run_of(name, data, folder / "timed", steps=100, seed=seed)))
    run = run_of(name, data, folder / "run", steps=steps, seed=seed)
    began = time.process_time()
    bundle = train(run)
    spent = time.process_time() - began
    predictor = Predictor.load(bundle, device="cpu")
    tally = ChangeTally("binary")
    for row in (row for row in run.found.rows if row.split == "test"):
        told, truth = map_pair(predictor, row.files), run.found.labels(row)[0]
        found = told.changed(float(bundle.task["threshold"]))
        for place in product(*(range(0, side, BLOCK) for side in truth.shape)):
            block = tuple(slice(start, start + BLOCK) for start in place)
            tally.add_binary(f"{row.id} {place}", found[block], truth[block], valid=told.valid[block])
    parameters = sum(p.numel() for p in predictor.network.parameters())
    return {"tally": tally, "steps": steps, "spent": spent, "parameters": parameters, "checks": bundle.card["checks"]}


def line(name: str, row: Mapping[str, Any], plain: ChangeTally | None) -> str:
    """One row of the table; `plain` the tally of the Siamese U-Net when it ran."""
    tally, checks = row["tally"], row["checks"]
    figures, interval = tally.figures(), tally.intervals()["f1"] or (float("nan"),) * 2
    gap = "-"
    if plain is not None and plain is not tally:
        told = paired_difference(tally, plain)["f1"]
        gap = f"{told['difference']:+.3f} [{told['interval'][0]:+.3f}, {told['interval'][1]:+.3f}]"
    cells = [
        *(name, f"{row['parameters']:,}", f"{row['steps']}", f"{row['spent']:.0f}"),
        f"{figures['f1']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]",
        *(f"{figures[key] or 0:.3f}" for key in ("iou", "precision", "recall")),
        *(gap, f"{checks['same_scene_changed']:.4f}", f"{checks['swap_iou']:.3f}"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    asked = parser.parse_args()
    data = SHARED / "data" / "change_levir"
    if not data.is_dir():
        sys.stdout.write(f"{data}: not there; set MEDMAMBA_SHARED\n")
        return
    NETWORKS[SIAMESE] = siamese
    torch.set_num_threads(1)
    head = "network|parameters|steps|CPU s|F1 [95 %]|IoU|precision|recall|F1 less that of the plain one [95 %]"
    lines = [
        f"{machine()}; one thread; about {asked.seconds:.0f} CPU s of steps of 4 patches of 96 x 96,",
        f"seed {asked.seed}; threshold from the validation pair",
        "",
        f"| {' | '.join(head.split('|'))} | f(A, A) changed | swap IoU |",
        "|" + "---|" * 11,
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    plain: ChangeTally | None = None
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            row = score(name, data, Path(folder), seconds=asked.seconds, seed=asked.seed)
        plain = row["tally"] if CONTENDERS[name][0] == SIAMESE else plain
        sys.stdout.write(line(name, row, plain) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
