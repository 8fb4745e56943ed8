"""Makers of tiny pairs: scenes of ground on which blocks change, and a network that sees every difference of one cell.

`DIFFERENCE` looks at no neighbour, so what it says of a pair is known and the same for any window.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medmamba.bundle import Bundle, save_bundle
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing
from tests.geo.maker import texture, write_tif

DIFFERENCE = "difference"  # to be set in NETWORKS by the test
CLASSES = ("unchanged", "dark", "middle", "bright")
SIZE, BRIGHTER = (96, 120), 70  # cells a side; how much brighter a new block is, in DN
BLOCKS = ((slice(20, 36), slice(30, 50)), (slice(60, 70), slice(80, 100)))


class Difference(nn.Module):
    """(B, 6, H, W) -> scores (B, 2 or 2 + 2K, H, W): changed where the dates differ by 0.5 on average."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        self.classes = (int(config["out_channels"]) - 2) // 2

    def forward(self, x: Tensor) -> Tensor:
        dates = x[:, :3].mean(1, keepdim=True), x[:, 3:].mean(1, keepdim=True)
        score = self.sharpness * ((dates[1] - dates[0]).abs() - 0.5)
        middles = torch.tensor([9.0, -0.5, 0.5, 1.2])[None, :, None, None]  # of a class, in scaled values
        kinds = [-(date - middles).abs() for date in dates] if self.classes else []
        return torch.cat([-score, score, *kinds], dim=1)


def make_bundle(folder: Path, *, task: str = "binary_change", window: int = 48, **settings: Any) -> Bundle:
    """The network above, 8 bits and three bands a date; `settings` of the task."""
    count = 2 if task == "binary_change" else 2 + 2 * len(CLASSES)
    channels = tuple(
        Channel(role=role, volume=band, scaling="fixed", shift=127.5, scale=64.0)
        for role in ("before", "after")
        for band in range(3)
    )
    classes = {} if task == "binary_change" else {"classes": list(CLASSES)}
    config = {"in_channels": 6, "out_channels": count}
    return save_bundle(
        folder,
        name="pairs",
        network=DIFFERENCE,
        config=config,
        preprocessing=Preprocessing(
            channels=channels, windowing=Windowing(size=(window, window), overlap=(window // 2,) * 2), canonical=False
        ),
        task={"name": task, **classes, **settings},
        states=[Difference(config).state_dict()],
    )


def ground(seed: int = 0) -> np.ndarray:
    """Three bands of alike texture, (3, rows, cols) uint8."""
    base = texture(SIZE, 1, seed, smooth=1.5)[0]
    return np.clip(np.rint(np.stack([base * gain for gain in (0.8, 1.0, 1.2)]) * 120), 1, 255).astype(np.uint8)


def changed(scene: np.ndarray) -> np.ndarray:
    """The same ground with BLOCKS brighter."""
    later = scene.astype(np.int16)
    for block in BLOCKS:
        later[(slice(None), *block)] += BRIGHTER
    return np.clip(later, 1, 255).astype(np.uint8)


def truth() -> np.ndarray:
    """Where `changed` changes, (rows, cols) bool."""
    result = np.zeros(SIZE, dtype=bool)
    for block in BLOCKS:
        result[block] = True
    return result


def write_pair(folder: Path, stem: str = "a", *, seed: int = 0, **options: Any) -> tuple[Path, Path]:
    """Two GeoTIFFs on one grid, folder/before/<stem>.tif and folder/after/<stem>.tif: a folder of pairs."""
    scene = ground(seed)
    return (
        write_tif(folder / "before" / f"{stem}.tif", scene, **options),
        write_tif(folder / "after" / f"{stem}.tif", changed(scene), **options),
    )
