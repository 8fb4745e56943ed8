"""The page of a compared pair: both dates under a swipe with the change on them, areas, confidence, shifts, lineage.

One HTML file that opens offline: pictures and script inside, no link to anywhere; text from outside is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from geo.preview import class_picture, picture, write_png
from geo.radiometry import common_stretch
from geo.scene import Scene
from medmamba.files import write_bytes
from medmamba.source import Source
from pipelines.pages.report import _environment, sha256

LONGEST = 1024  # points a side of the pictures
BAR_HEIGHT = 100
ARROW = 1 / 24  # of the frame: the longest arrow
QUALITY = 88  # of the JPEG pictures


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """(h, w, 4) uint8: the two dates under one stretch, and the change in its colours, transparent elsewhere."""

    before: np.ndarray
    after: np.ndarray
    change: np.ndarray


def take_pictures(before: Scene, after: Scene, codes: Source, colours: Mapping[int, tuple[int, int, int]]) -> Pictures:
    """Small pictures of a pair and its class raster."""
    stretch = common_stretch([before, after])
    bands = len(before.channels)
    rgb = (0, 1, 2) if bands == 3 else (2, 1, 0) if bands > 3 else (0, 0, 0)  # four and more begin with blue
    return Pictures(
        before=picture(before, stretch, rgb, longest=LONGEST),
        after=picture(after, stretch, rgb, longest=LONGEST),
        change=class_picture(codes, colours, longest=LONGEST),
    )


def write_quicklook(path: Path, shown: Pictures) -> None:
    """Before, after, and after with the change on it, side by side."""
    over = shown.change[..., 3:] / 255 * 0.65
    marked = (shown.after[..., :3] * (1 - over) + shown.change[..., :3] * over).astype(np.uint8)
    gap = np.full((len(marked), 4, 3), 255, dtype=np.uint8)
    write_png(path, np.hstack([shown.before[..., :3], gap, shown.after[..., :3], gap, marked]))


def write_page(
    path: Path,
    shown: Pictures,
    *,
    title: str,
    subtitle: str,
    names: Sequence[str],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    tables: Sequence[Mapping[str, Any]],
    confidence: np.ndarray,
    record: Mapping[str, Any],
    provenance: Sequence[tuple[str, str]],
    warnings: Sequence[str],
) -> None:
    """`path` as one HTML file. `confidence`: cells by step of confidence; `record`: what `open_pair` did."""
    script = Path(__file__).with_name("change.js").read_text(encoding="utf-8")
    shape = record["alignment"]["shape"]
    registration = record.get("registration") or {"blocks": [], "verdict": "", "reason": ""}
    longest = max((np.hypot(b["rows_px"], b["cols_px"]) for b in registration["blocks"]), default=0.0)
    scale = max(shape) * ARROW / longest if longest else 1.0
    page = (
        _environment()
        .get_template("change.html")
        .render(
            title=title,
            subtitle=subtitle,
            allowed=sha256(script),
            script=script,
            before=uri(shown.before[..., :3], "JPEG"),
            after=uri(shown.after[..., :3], "JPEG"),
            change=uri(shown.change, "PNG"),
            names=names,
            legend=[(name, "#{:02x}{:02x}{:02x}".format(*colour)) for name, colour in legend],
            tables=tables,
            histogram=bars(confidence),
            arrows=[
                (b["col"], b["row"], b["col"] + scale * b["cols_px"], b["row"] + scale * b["rows_px"])
                for b in registration["blocks"]
            ],
            arrow_scale=f"{scale:.3g}",
            frame=shape,
            stroke=max(shape) / 300,
            registration=f"{registration['verdict']}: {registration['reason']}",
            provenance=provenance,
            warnings=warnings,
        )
    )
    write_bytes(path, page.encode("utf-8", "replace"))


def bars(counts: np.ndarray) -> list[dict[str, Any]]:
    """Bars of the histogram; the highest fills the picture."""
    share, step = counts / max(int(counts.sum()), 1), 100 // len(counts)
    highest = max(float(share.max()), 1e-9)
    return [
        {"height": round(BAR_HEIGHT * float(s) / highest, 1), "name": f"{i * step} %", "told": f"{s:.1%} of the cells"}
        for i, s in enumerate(share)
    ]


def uri(pixels: np.ndarray, kind: str) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, kind, optimize=True, **({"quality": QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
