"""Change learned from scratch on a few LEVIR-CD crops: `python benchmarks/change.py [--steps 200] [--only NAME ...]`.

The published sample of LEVIR-CD: three pairs of 256 x 256 to learn from (one shows no change), one to choose the
threshold on, two to score; the folder is `data/change_levir` of the shared data beside the project (MEDMAMBA_SHARED).
Every network gets the same budget: the same number of steps, patches, loss, optimizer and schedule of the production
loop; CPU seconds are told beside. Two crops of one city say nothing about LEVIR-CD: compare the rows with each other.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.change_pair import split_dates
from pipelines.learning.change_run import ChangeRun
from pipelines.learning.train import train
from pipelines.networks import NETWORKS
from pipelines.scoring.change_evaluate import evaluate_pairs
from pipelines.serving.predict import Predictor

SHARED = Path(os.environ.get("MEDMAMBA_SHARED", Path(__file__).parents[2] / "shared"))
WIDTHS = (16, 32, 64, 128)
SIAMESE = "siamese_unet"
PAIR = {"depths": [1, 1, 2, 1], "widths": [24, 48, 96, 192], "width": 32, "drop_path": 0.0}
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


def score(name: str, data: Path, folder: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Trains one contender and scores it on the test pairs."""
    architecture, network = CONTENDERS[name]
    values = {
        **{"name": "bench", "architecture": architecture, "network": network, "dataset": str(data)},
        **{"output": str(folder), "epochs": 1, "steps_per_epoch": steps, "batch": 4, "lr": 2e-3, "seed": seed},
        **{"warmup_steps": steps // 10, "foreground_share": 0.7, "device": "cpu", "memory": "auto"},
        "preprocessing": {"window": [128, 128]},
    }
    run = ChangeRun.check(values)
    began = time.process_time()
    bundle = train(run)
    seconds = time.process_time() - began
    predictor = Predictor.load(bundle, device="cpu")
    tests = [row for row in run.found.rows if row.split == "test"]
    found = evaluate_pairs(predictor, run.found, tests, threshold=bundle.task["threshold"], seed=seed)
    figures = found.at_threshold["binary"].figures()
    parameters = sum(p.numel() for p in predictor.network.parameters())
    told = {key: figures[key] for key in ("f1", "iou", "precision", "recall")}
    return {**told, "parameters": parameters, "seconds": seconds, "checks": bundle.card["checks"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    asked = parser.parse_args()
    data = SHARED / "data" / "change_levir"
    if not data.is_dir():
        sys.stdout.write(f"{data}: not there; set MEDMAMBA_SHARED\n")
        return
    NETWORKS[SIAMESE] = siamese
    lines = [
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{asked.steps} steps of 4 patches of 128 x 128, seed {asked.seed}; threshold from the validation pair",
        "",
        "| network | parameters | CPU s | F1 | IoU | precision | recall | f(A, A) changed | swap IoU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            row = score(name, data, Path(folder), steps=asked.steps, seed=asked.seed)
        cells = [f"{row[key]:.3f}" for key in ("f1", "iou", "precision", "recall")]
        checks = row["checks"]
        cells += [f"{checks['same_scene_changed']:.4f}", f"{checks['swap_iou']:.3f}"]
        told = [name, f"{row['parameters']:,}", f"{row['seconds']:.0f}", *cells]
        sys.stdout.write(f"| {' | '.join(told)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
