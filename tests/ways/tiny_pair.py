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
from tests.geo.maker import texture, transform, write_tif

DIFFERENCE = "difference"  # to be set in NETWORKS by the test
CLASSES = ("unchanged", "dark", "middle", "bright")
SIZE, BRIGHTER = (96, 120), 70  # cells a side; how much brighter a new block is, in DN
BLOCKS = ((slice(20, 36), slice(30, 50)), (slice(60, 70), slice(80, 100)))


class Difference(nn.Module):
    """(B, 2C, H, W) -> scores (B, 2 or 2 + 2K, H, W): changed where the dates differ by 0.5 on average."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        self.classes = (int(config["out_channels"]) - 2) // 2

    def forward(self, x: Tensor) -> Tensor:
        dates = [date.mean(1, keepdim=True) for date in x.chunk(2, dim=1)]
        score = self.sharpness * ((dates[1] - dates[0]).abs() - 0.5)
        middles = torch.tensor([9.0, -0.5, 0.5, 1.2])[None, :, None, None]  # of a class, in scaled values
        kinds = [-(date - middles).abs() for date in dates] if self.classes else []
        return torch.cat([-score, score, *kinds], dim=1)


def make_bundle(
    folder: Path,
    *,
    task: str = "binary_change",
    window: int = 48,
    bands: int = 3,
    shift: float = 127.5,
    scale: float = 64.0,
    **settings: Any,
) -> Bundle:
    """The network above, of 8 bits and three bands a date unless told otherwise; `settings` of the task."""
    count = 2 if task == "binary_change" else 2 + 2 * len(CLASSES)
    channels = tuple(
        Channel(role=role, volume=band, scaling="fixed", shift=shift, scale=scale)
        for role in ("before", "after")
        for band in range(bands)
    )
    classes = {} if task == "binary_change" else {"classes": list(CLASSES)}
    config = {"in_channels": 2 * bands, "out_channels": count}
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


def write_safe(folder: Path, dn: np.ndarray, classes: np.ndarray, *, date: str, baseline: str) -> Path:
    """A Sentinel-2 L2A product of four bands at 10 m, `dn` (4, rows, cols) uint16, and scene classes at 20 m."""
    offset = 1000 if baseline >= "04.00" else 0
    layers = dict(zip(("B02", "B03", "B04", "B08"), dn + offset, strict=True)) | {"SCL": classes}
    listed = []
    for band, values in layers.items():
        side, room = (20.0, "R20m") if band == "SCL" else (10.0, "R10m")
        place = f"GRANULE/L2A_T33/IMG_DATA/{room}/T33_{date}_{band}_{room[1:]}"
        options = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES", "transform": transform(side)}
        write_tif(folder / f"{place}.jp2", values[None], **options)
        listed.append(f"<IMAGE_FILE>{place}</IMAGE_FILE>")
    offsets = "".join(f'<BOA_ADD_OFFSET band_id="{band}">{-offset}</BOA_ADD_OFFSET>' for band in range(13))
    (folder / "MTD_MSIL2A.xml").write_text(
        f'<n1:Level xmlns:n1="urn:x"><n1:General_Info><PRODUCT_START_TIME>{date}T10:00:00Z</PRODUCT_START_TIME>'
        f"<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>{''.join(listed)}"
        f"<BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE>{offsets if offset else ''}"
        "</n1:General_Info></n1:Level>"
    )
    return folder
