"""What can be seen where: no data, cloud, shadow; from the product's own classes first, else by a simple spectral test.

A `QualitySource` gives one channel of codes (QUALITY) on a scene's grid; a `ClearSource` is the scene with all that is
not clear made invalid; a `MaskingSink` writes 254 (not observable) and 255 (no data) over a product on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from geo.crs import CellArea
from geo.formats.geotiff import NODATA, UNOBSERVABLE
from geo.scene import Scene
from medmamba.errors import InputError
from medmamba.preprocessing import slabs
from medmamba.sample import Image
from medmamba.source import Sink, Source
from medmamba.windows import Window

CLEAR, NO_DATA, CLOUD, SHADOW = 0, 1, 2, 3
QUALITY = {"clear": CLEAR, "nodata": NO_DATA, "cloud": CLOUD, "shadow": SHADOW}
SCL = {0: NO_DATA, 1: NO_DATA, 3: SHADOW, 8: CLOUD, 9: CLOUD, 10: CLOUD}  # ESA scene classes; the others are clear
QA_FILL, QA_CLOUD, QA_SHADOW = 0b1, 0b1110, 0b10000  # USGS QA_PIXEL: fill; dilated cloud, cirrus, cloud; cloud shadow
CLOUD_BRIGHTNESS, CLOUD_WHITENESS = 0.30, 0.35  # reflectance of the darkest visible band; spread against the mean
SHADOW_NEAR_INFRARED, SHADOW_VISIBLE = 0.08, 0.06  # reflectance below both: cloud shadow or dark water


def codes_of_scl(classes: np.ndarray) -> np.ndarray:
    """Quality codes of Sentinel-2 scene classes (..., uint8)."""
    table = np.zeros(256, dtype=np.uint8)
    for value, code in SCL.items():
        table[value] = code
    return table[np.clip(classes, 0, 255).astype(np.uint8)]


def codes_of_qa_pixel(bits: np.ndarray) -> np.ndarray:
    """Quality codes of Landsat Collection 2 QA_PIXEL bits (..., uint16)."""
    bits = bits.astype(np.uint16)
    codes = np.where(bits & QA_SHADOW, SHADOW, CLEAR)
    codes = np.where(bits & QA_CLOUD, CLOUD, codes)
    return np.where(bits & QA_FILL, NO_DATA, codes).astype(np.uint8)


def codes_of_reflectance(bands: np.ndarray) -> np.ndarray:
    """Quality codes by a spectral test of (blue, green, red, near infrared, ...) reflectance, (C >= 4, rows, cols).

    Cloud: bright in all visible bands and white; shadow: dark in the near infrared and the visible. Snow and salt pass
    for cloud, dark water for shadow: what is not sure is not observed.
    """
    visible, infrared = bands[:3].astype(np.float32), bands[3]
    mean = visible.mean(axis=0)
    white = np.abs(visible - mean).sum(axis=0) < CLOUD_WHITENESS * np.maximum(mean, 1e-6)
    cloud = (visible.min(axis=0) > CLOUD_BRIGHTNESS) & white
    shadow = (infrared < SHADOW_NEAR_INFRARED) & (visible.max(axis=0) < SHADOW_VISIBLE)
    return np.where(cloud, CLOUD, np.where(shadow, SHADOW, CLEAR)).astype(np.uint8)


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"SCL": codes_of_scl, "QA_PIXEL": codes_of_qa_pixel}


class QualitySource:
    """Quality codes (1, rows, cols) uint8 on the grid of `scene`: its invalid cells are `nodata`, the rest by `classes`
    (an SCL or QA_PIXEL band on the same grid, brought there by nearest cell), else by the spectral test.

    `rule` names what was used: "SCL", "QA_PIXEL", "spectral", or "nodata only" where the scene is not in reflectance.
    """

    def __init__(self, scene: Scene, classes: Scene | None = None) -> None:
        self.scene, self.classes = scene, classes
        self.grid, self.channels, self.dtype = scene.grid, ("quality",), np.dtype("uint8")
        if classes is not None:
            self.rule = classes.channels[0]
            if self.rule not in RULES or not classes.grid.matches(scene.grid):
                raise InputError(
                    "grid_mismatch", f"quality band {self.rule!r} must be one of {list(RULES)} on the grid"
                )
        else:
            self.rule = "spectral" if scene.units == "reflectance" and len(scene.channels) >= 4 else "nodata only"

    def read(self, window: Window) -> Image:
        image = self.scene.read(window)
        return Image(self.codes(image, window)[None], image.grid, self.channels)

    def codes(self, image: Image, window: Window) -> np.ndarray:
        """Codes (rows, cols) of a window whose image was read already."""
        codes = np.zeros(window.size, dtype=np.uint8)
        if self.classes is not None:
            told = self.classes.read(window)
            codes = RULES[self.rule](told.array[0])
            if told.valid is not None:
                codes = np.where(told.valid, codes, NO_DATA)
        elif self.rule == "spectral":
            codes = codes_of_reflectance(image.array)
        return codes if image.valid is None else np.where(image.valid, codes, NO_DATA).astype(np.uint8)


class ClearSource:
    """The scene of a QualitySource with everything that is not clear made invalid."""

    def __init__(self, quality: QualitySource) -> None:
        self.quality, self.scene = quality, quality.scene
        self.grid, self.channels, self.dtype = self.scene.grid, self.scene.channels, self.scene.dtype
        self.units, self.notes = self.scene.units, (*self.scene.notes, f"clouds by: {quality.rule}")

    def read(self, window: Window) -> Image:
        image = self.scene.read(window)
        return Image(image.array, image.grid, image.channels, self.quality.codes(image, window) == CLEAR)

    def close(self) -> None:
        """Lets the files go."""
        self.scene.close()


def unobserved(qualities: Sequence[Source], window: Window) -> np.ndarray:
    """0 where every date is clear, 255 where a date has no data, else 254, (rows, cols) uint8."""
    return flags_of(np.stack([q.read(window).array[0] for q in qualities]))


def flags_of(codes: np.ndarray) -> np.ndarray:
    """The same from quality codes (dates, rows, cols)."""
    missing, hidden = (codes == NO_DATA).any(axis=0), (codes != CLEAR).any(axis=0)
    return np.where(missing, NODATA, np.where(hidden, UNOBSERVABLE, 0)).astype(np.uint8)


class MaskingSink:
    """A sink for uint8 products that wears another: 255 and 254 are written where not every date is clear.

    `hidden` is what is written where a cloud or shadow lies: 254 into classes, 255 into a confidence.
    """

    def __init__(self, sink: Sink, qualities: Sequence[Source], *, hidden: int = UNOBSERVABLE) -> None:
        self.sink, self.qualities, self.hidden = sink, tuple(qualities), hidden

    def write(self, window: Window, array: np.ndarray) -> None:
        flags = unobserved(self.qualities, window)
        over = np.where(flags == UNOBSERVABLE, self.hidden, flags).astype(array.dtype)
        self.sink.write(window, np.where(flags[None] > 0, over[None], array))

    def close(self) -> None:
        self.sink.close()


def observability(qualities: Sequence[Source], area: CellArea) -> dict[str, Any]:
    """Area by quality of each date, and what all dates together show, in hectares (cells without a CRS)."""
    counts = np.zeros((len(qualities), len(QUALITY)), dtype=np.int64)
    together = dict.fromkeys((0, UNOBSERVABLE, NODATA), 0)
    for window in slabs(area.grid.shape):
        cells = area.counts(window)
        codes = np.stack([q.read(window).array[0] for q in qualities])
        for date, plane in enumerate(codes):
            for code in QUALITY.values():
                counts[date, code] += cells[plane == code].sum()
        flags = flags_of(codes)
        for flag in together:
            together[flag] += int(cells[flags == flag].sum())
    unit = "ha" if area.unit == "m2" else "cells"
    return {
        "unit": unit,
        "dates": [{n: area.hectares(int(c[k])) for n, k in QUALITY.items()} for c in counts],
        "observed": area.hectares(together[0]),
        "not_observable": area.hectares(together[UNOBSERVABLE]),
        "nodata": area.hectares(together[NODATA]),
    }
