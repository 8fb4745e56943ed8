"""A tiny labelled cohort on disk: bright boxes (label 3) and dim ones (label 7) in noise, half the files turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

LABELS = {3: "bright", 7: "dim"}


def write_cohort(folder: Path, *, cases: int = 6, size: int = 16, seed: int = 0) -> Path:
    """Manifest of `cases` volumes of size^3 voxels of 1.5 mm."""
    rng = np.random.default_rng(seed)
    lines = ["case,group,t1,label"]
    for number in range(cases):
        labels = np.zeros((size,) * 3, dtype=np.uint8)
        for value in LABELS:
            start = rng.integers(0, size - size // 2 + 1, 3)
            labels[tuple(slice(s, s + size // 2 - 1) for s in start)] = value
        image = rng.normal(100, 5, labels.shape) + 60 * (labels == 3) + 30 * (labels == 7)
        affine = np.diag([1.5, -1.5 if number % 2 else 1.5, 1.5, 1.0])
        write_nifti(folder / f"c{number}_t1.nii.gz", image.astype(np.int16), affine)
        write_nifti(folder / f"c{number}_dseg.nii.gz", labels, affine)
        lines.append(f"c{number},p{number // 2},c{number}_t1.nii.gz,c{number}_dseg.nii.gz")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """An array in file order (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def run_values(manifest: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run file as plain values, small enough for a test."""
    return {
        "name": "boxes",
        "manifest": str(manifest),
        "output": str(output),
        "network": {"widths": [6, 12], "depths": [1, 1], "state": 2},
        "preprocessing": {"channels": [{"role": "t1"}], "window": [12, 12, 12], "overlap": [4, 4, 4]},
        "labels": {str(k): v for k, v in LABELS.items()},
        "epochs": 2,
        "steps_per_epoch": 3,
        "validation_share": 0.34,
        "device": "cpu",
        **changes,
    }
