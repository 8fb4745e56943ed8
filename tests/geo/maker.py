"""Small rasters made on the spot, and sources over arrays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from scipy.ndimage import gaussian_filter

from geo.crs import grid_of
from medmamba.grid import Grid
from medmamba.sample import Image
from medmamba.source import ArraySource

UTM = "EPSG:32633"


def transform(side: float = 10.0, x: float = 400_000.0, y: float = 5_000_000.0) -> Affine:
    return Affine(side, 0, x, 0, -side, y)


def grid(shape: tuple[int, int], side: float = 10.0, crs: str = UTM) -> Grid:
    return grid_of(transform(side), shape, CRS.from_user_input(crs))


def texture(shape: tuple[int, int], bands: int = 1, seed: int = 0, smooth: float = 2.0) -> np.ndarray:
    """Random ground (bands, rows, cols) float64 with features of a few cells, about 0..1."""
    noise = np.random.default_rng(seed).normal(size=(bands, *shape))
    soft = np.stack([gaussian_filter(n, smooth) for n in noise])
    return 0.5 + 0.15 * soft / soft.std()


def write_tif(path: Path, array: np.ndarray, **options: Any) -> Path:
    """(C, rows, cols) as a GeoTIFF; UTM 33N at 10 m unless told otherwise. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask, scales = options.pop("mask", None), options.pop("scales", None)
    offsets, names = options.pop("offsets", None), options.pop("names", None)
    settings = {"driver": "GTiff", "crs": UTM, "transform": transform(), **options}
    size = {"count": len(array), "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        file = rasterio.open(path, "w", **size, **settings)
    with file:
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
        if scales:
            file.scales, file.offsets = scales, offsets
        for i, name in enumerate(names or (), 1):
            file.set_band_description(i, name)
    return path


class SceneOf(ArraySource):
    """An array in memory as a scene of geo."""

    def __init__(
        self, array: np.ndarray, on: Grid | None = None, valid: np.ndarray | None = None, units: str = "DN uint8"
    ) -> None:
        on = on or grid((array.shape[1], array.shape[2]))
        super().__init__(Image(array, on, tuple(f"{i}" for i in range(1, len(array) + 1)), valid))
        self.units, self.notes = units, ()

    def close(self) -> None:
        """Nothing is open."""
