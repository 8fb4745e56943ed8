"""TIFF stacks (plain, ImageJ, OME), in, by tifffile: pages are slices, spacing from the metadata where it stands there.

A TIFF knows no patient: its axes are taken as an ITK reader takes them (left, posterior, superior), and a note says so.
"""

from __future__ import annotations

import logging
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmamba.errors import InputError
from medmamba.formats.opening import file_grid, file_shape, one_line, require_file, require_numbers, require_size
from medmamba.sample import Image
from medmamba.windows import Window

if TYPE_CHECKING:
    import tifffile

SUFFIXES = (".tif", ".tiff")
MM = {"mm": 1.0, "cm": 10.0, "m": 1e3, "inch": 25.4, "nm": 1e-6} | dict.fromkeys(
    ("um", "µm", "μm", "\\u00B5m", "micron", "microns"), 1e-3
)
RESOLUTION_UNITS = {2: "inch", 3: "cm"}
SLICES, CHANNELS = "ZIQ", "CS"  # tifffile's letters: depth, a series of pages; channels, samples of a pixel
UNPLACED = "a TIFF does not say where it lies in the patient: axes taken as left, posterior, superior"
NO_SPACING = "the file gives no spacing along {}: taken as 1 mm"


class TiffSource:
    """The first series of a TIFF as a Source: (C, z, y, x), RAS+ mm; unpacked page by page into a scratch file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        with _opened(path) as file:
            series = file.series[0]
            self._axes, self._shape = series.axes, tuple(int(n) for n in series.shape)
            stored = np.dtype(series.dtype).newbyteorder("=")
            packed = series.keyframe.compression != 1
            spacing = _spacing(file)
        self.dtype = np.dtype("uint8") if stored.kind == "b" else stored
        require_numbers(path, self.dtype)
        sizes = dict(zip(self._axes, self._shape, strict=True))
        foreign = [a for a, n in sizes.items() if n > 1 and a not in (*SLICES, *CHANNELS, "Y", "X")]
        depth, width = ([a for a in letters if sizes.get(a, 1) > 1] for letters in (SLICES, CHANNELS))
        if foreign or len(depth) > 1 or len(width) > 1:
            raise InputError("wrong_channels", f"{path}: axes {self._axes} of {self._shape}; expected [C, ] Z, Y, X")
        self._order = [*width, *depth, "Y", "X"]
        (x, y, z), _ = file_shape(path, (sizes["X"], sizes["Y"], sizes[depth[0]] if depth else 1))
        require_size(path, path, int(np.prod(self._shape, dtype=object)) * self.dtype.itemsize, packed=packed)
        self.channels = tuple(f"{i}" for i in range(sizes[width[0]] if width else 1))
        lacking = [axis for axis, n in zip("XYZ", (x, y, z), strict=True) if n > 1 and axis not in spacing]
        self.notes = (UNPLACED, *(NO_SPACING.format(axis) for axis in lacking))
        sx, sy, sz = (spacing.get(axis, 1.0) for axis in "XYZ")
        self.grid = file_grid(path, (x, y, z), np.diag([-sx, -sy, sz, 1.0]))
        self._array: np.ndarray | None = None

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        if self._array is None:
            self._array = self._scratch()
        values = np.array(self._array[(slice(None), *window.slices)])
        return Image(values, self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the scratch file go."""
        self._array = None

    def _scratch(self) -> np.ndarray:
        """The series unpacked, seen as (C, z, y, x)."""
        with tempfile.TemporaryFile() as scratch:  # has no name: gone with the process, however that ends
            scratch.truncate(int(np.prod(self._shape, dtype=object)) * self.dtype.itemsize)
            array = np.memmap(scratch, dtype=self.dtype, mode="r+", shape=self._shape)
            with _opened(self.path) as file:
                file.asarray(series=0, out=array)
        letters = [a for a, n in zip(self._axes, self._shape, strict=True) if n > 1 or a in "YX"]
        squeezed = array.reshape([n for a, n in zip(self._axes, self._shape, strict=True) if a in letters])
        return squeezed.transpose([letters.index(a) for a in self._order]).reshape(len(self.channels), *self.grid.shape)


class _opened:
    """A TIFF whose damage, in whatever form it strikes the reader, becomes an InputError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tifffile.TiffFile:
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would say is in the refusal
        try:
            self.file = tifffile.TiffFile(self.path)
            if not self.file.series:
                raise ValueError("no page")
        except Exception as error:
            self._refuse(error)
        return self.file

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, InputError):
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        text = one_line(error)[:200]
        if "imagecodecs" in text:
            raise InputError(
                "unsupported_format", f"{self.path}: compressed ({text}); save it uncompressed or with deflate"
            ) from None
        raise InputError("corrupt_file", f"{self.path}: not readable as TIFF ({text}); copy it again") from None


def _spacing(file: tifffile.TiffFile) -> dict[str, float]:
    """mm along X, Y, Z as far as the metadata tell: OME, ImageJ, or the resolution tags."""
    if file.is_ome and file.ome_metadata:
        pixels = next((e for e in xml.fromstring(file.ome_metadata).iter() if e.tag.endswith("}Pixels")), None)
        found = {} if pixels is None else pixels.attrib
        told = {a: (found.get(f"PhysicalSize{a}"), found.get(f"PhysicalSize{a}Unit", "µm")) for a in "XYZ"}
        return {a: float(v) * MM[u] for a, (v, u) in told.items() if v and u in MM and float(v) > 0}
    tags = file.pages[0].tags  # type: ignore[union-attr]
    described = file.imagej_metadata or {}
    unit = described.get("unit") or RESOLUTION_UNITS.get(int(tags.valueof("ResolutionUnit", 1)), "")
    if unit not in MM:
        return {}
    spacing = {}
    for axis in "XY":
        cells, length = tags.valueof(f"{axis}Resolution", (0, 1))
        if cells and length:
            spacing[axis] = length / cells * MM[unit]
    if described.get("spacing"):
        spacing["Z"] = abs(float(described["spacing"])) * MM[unit]
    return spacing
