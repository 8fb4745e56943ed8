"""The picture of one case: three planes in grey with the contours of the labels, in true proportions.

Only the planes that are shown are read, so the image may be larger than memory. The same arrays give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from scipy.ndimage import find_objects

from medmamba.files import write_bytes
from medmamba.grid import RAS
from medmamba.preprocessing import canonical_axes
from medmamba.source import PermutedSource, Source, turned
from medmamba.windows import Window

LARGEST_SIDE = 512  # pixels of a plane that are drawn; larger planes are thinned
CENTROID_CELLS = 2_000_000  # the middle of the labels is found on at most about this many cells
LEGEND_ROWS = 16
PANEL_INCHES, DPI = 3.2, 100
FIRST_COLOURS = (0xE6550D, 0x31A3F5, 0x4DC36B, 0xF2C12E, 0xC77CFF, 0x00C2C7, 0xFF7FA7, 0xA6D854, 0xB58863, 0x8DA0FF)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One picture: `grey` and `labels` (rows, columns) rising upwards and to the right, `extent_mm` (width, height)."""

    title: str
    letters: tuple[str, str]
    grey: np.ndarray
    labels: np.ndarray
    extent_mm: tuple[float, float]


def preview_png(path: Path, image: Source, labels: np.ndarray, names: Mapping[int, str]) -> None:
    """Writes a PNG of the first channel with the contours of `labels` (integers, shape of the grid), atomically.

    Volumes in `RAS+ mm` are turned to axial, coronal and sagittal planes (left of the body on the left); others are
    cut along their own axes; a raster is shown whole. `names`: label value -> name for the legend.
    """
    write_bytes(path, render(planes_of(image, labels), names))


def planes_of(image: Source, labels: np.ndarray) -> list[Plane]:
    """The planes through the middle of the labels (of the image when there are none), read one by one."""
    if labels.shape != image.grid.shape:
        raise ValueError(f"labels of shape {labels.shape}, the image has {image.grid.shape}")
    named = image.grid.rank == 3 and image.grid.frame == RAS
    if named:
        order, flips = canonical_axes(image.grid)
        image = PermutedSource(image, order, flips)
        labels = turned(labels, order, flips)
    if image.grid.rank == 2:
        return [_cut(image, labels, None, 0, "image", ("", ""))]
    titles = ("axial", "coronal", "sagittal") if named else ("axis 0", "axis 1", "axis 2")
    letters = (("L", "R"), ("L", "R"), ("P", "A")) if named else (("", ""),) * 3
    middle = middle_of(labels)
    return [_cut(image, labels, axis, middle[axis], titles[axis], letters[axis]) for axis in range(3)]


def middle_of(labels: np.ndarray) -> tuple[int, ...]:
    """Per axis the centroid of the labels, their largest plane where that one has none; the middle without labels."""
    step = max(1, int(np.ceil((labels.size / CENTROID_CELLS) ** (1 / labels.ndim))))
    thin = labels[(slice(None, None, step),) * labels.ndim]
    if step > 1 and not thin.any():
        thin, step = labels, 1
    found = thin != 0
    middle = []
    for axis, n in enumerate(labels.shape):
        counts = np.count_nonzero(found, axis=tuple(a for a in range(labels.ndim) if a != axis))
        if not counts.any():
            middle.append(n // 2)
            continue
        centre = round(float(np.average(np.arange(len(counts)), weights=counts)))
        middle.append((centre if counts[centre] else int(counts.argmax())) * step)
    return tuple(middle)


def colour(value: int) -> tuple[float, float, float]:
    """The colour of a label value: the same in every picture; ten chosen ones, then golden steps of the hue."""
    if value <= len(FIRST_COLOURS):
        code = FIRST_COLOURS[(value - 1) % len(FIRST_COLOURS)]
        return (code >> 16) / 255, (code >> 8 & 255) / 255, (code & 255) / 255
    red, green, blue = hsv_to_rgb(((value * 0.61803398875) % 1, 0.65, 0.95))
    return float(red), float(green), float(blue)


def render(planes: list[Plane], names: Mapping[int, str]) -> bytes:
    """PNG bytes of the planes side by side with a legend of the labels that are seen."""
    seen = sorted({int(v) for p in planes for v in np.unique(p.labels) if v})
    figure = Figure(figsize=(PANEL_INCHES * len(planes) + 1.8, PANEL_INCHES + 0.3), dpi=DPI, facecolor="#101418")
    canvas = FigureCanvasAgg(figure)
    width = PANEL_INCHES / float(figure.get_size_inches()[0])
    for number, plane in enumerate(planes):
        axes = figure.add_axes((number * width + 0.006, 0.02, width - 0.012, 0.89))
        _draw(axes, plane)
    _legend(figure, seen, names, len(planes) * width)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _cut(
    image: Source, labels: np.ndarray, axis: int | None, index: int, title: str, letters: tuple[str, str]
) -> Plane:
    """One plane across `axis` (None: the raster itself), thinned to LARGEST_SIDE."""
    shape, rank = image.grid.shape, image.grid.rank
    start = tuple(index if a == axis else 0 for a in range(rank))
    window = Window(start=start, size=tuple(1 if a == axis else n for a, n in enumerate(shape)))
    keep = [a for a in range(rank) if a != axis]
    part = image.read(window)
    drop = () if axis is None else (axis,)
    grey = np.squeeze(part.array[0], axis=drop).astype(np.float32)
    if part.valid is not None:
        grey = np.where(np.squeeze(part.valid, axis=drop), grey, np.nan)
    thin = tuple(slice(None, None, -(-n // LARGEST_SIDE)) for n in grey.shape)
    height, wide = (shape[a] * image.grid.spacing[a] for a in keep)
    flat = np.squeeze(labels[window.slices], axis=drop)
    return Plane(title=title, letters=letters, grey=grey[thin], labels=flat[thin], extent_mm=(wide, height))


def _draw(axes: Axes, plane: Plane) -> None:
    wide, height = plane.extent_mm
    finite = plane.grey[np.isfinite(plane.grey)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    if high <= low:
        high = low + 1
    grey = np.nan_to_num(plane.grey, nan=low, posinf=high, neginf=low)
    axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, wide, 0, height), aspect="equal")
    rows, columns = plane.labels.shape
    for value, x, y, mask in _pieces(plane.labels):
        at_x, at_y = (x + 0.5) * wide / columns, (y + 0.5) * height / rows
        axes.contour(at_x, at_y, mask, levels=[0.5], colors=[colour(value)], linewidths=1.1)
    axes.set(xlim=(0, wide), ylim=(0, height))
    axes.set_axis_off()
    font = _font(9)
    axes.set_title(plane.title, color="#c9d1d9", fontproperties=font, pad=3)
    for where, letter in zip((0.02, 0.98), plane.letters, strict=True):
        side = "left" if where < 0.5 else "right"
        axes.text(
            where, 0.5, letter, color="#c9d1d9", fontproperties=font, ha=side, va="center", transform=axes.transAxes
        )


def _pieces(labels: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Per label: value, column and row indices, mask (float) of its box with one empty cell around it."""
    pieces = []
    values = [int(v) for v in np.unique(labels) if v]
    boxes = find_objects(np.searchsorted([0, *values], np.where(labels > 0, labels, 0))) if values else []
    for value, box in zip(values, boxes, strict=False):
        if box is None:
            continue
        mask = np.pad((labels[box] == value).astype(np.float32), 1)
        rows, columns = (np.arange(b.start - 1, b.stop + 1) for b in box)
        pieces.append((value, columns, rows, mask))
    return pieces


def _legend(figure: Figure, seen: list[int], names: Mapping[int, str], left: float) -> None:
    shown = seen[:LEGEND_ROWS]
    lines = [Line2D([], [], color=colour(v), linewidth=2.5) for v in shown]
    texts = [f"{names.get(v, v)}"[:24].replace("$", r"\$") for v in shown]
    if len(seen) > len(shown):
        lines.append(Line2D([], [], linestyle="none"))
        texts.append(f"and {len(seen) - len(shown)} more")
    if not seen:
        lines, texts = [Line2D([], [], linestyle="none")], ["no label"]
    font = _font(8)
    figure.legend(
        lines,
        texts,
        loc="center left",
        bbox_to_anchor=(left, 0.5),
        frameon=False,
        labelcolor="#e6edf3",
        prop=font,
        handlelength=1.2,
    )


def _font(size: float) -> FontProperties:
    """The font that matplotlib carries: no picture depends on what a machine has installed."""
    return FontProperties(fname=Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size=size)
