"""Makers of tiny data for the ways: a bundle of a small real network and volumes of 12 x 12 x 12 voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medmamba.bundle import Bundle, save_bundle
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing
from pipelines.networks import NETWORKS


def make_bundle(
    folder: Path, *, seed: int = 0, roles: tuple[str, ...] = ("ct",), name: str = "tiny", **config_of: Any
) -> Bundle:
    """An untrained Mamba U-Net of a few hundred weights, two labels; `config_of` it where it differs."""
    torch.manual_seed(seed)
    config = {
        "spatial_dims": 3,
        "in_channels": len(roles),
        "out_channels": 3,
        "widths": [2, 4],
        "depths": [1, 1],
        "state": 1,
        "mixer_from": 9,
        "mixer": "none",
        **config_of,
    }
    return save_bundle(
        folder,
        name=name,
        network="mamba_unet",
        config=config,
        preprocessing=Preprocessing(
            channels=tuple(Channel(role=r) for r in roles), windowing=Windowing(size=(12, 12, 12), overlap=(0, 0, 0))
        ),
        task={"name": "segmentation", "labels": {"1": "one", "2": "two"}},
        states=[NETWORKS["mamba_unet"](config).state_dict()],
    )


def write_volume(path: Path, seed: int = 0, *, constant: bool = False, size: int = 12) -> Path:
    """Noise (or one value) as int16, 1 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 1000, (size,) * 3).astype(np.int16)
    nib.save(nib.Nifti1Image(np.zeros_like(values) if constant else values, np.eye(4)), path)
    return path
