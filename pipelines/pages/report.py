"""The page of one run: cases sorted by suspicion, their pictures, what was set aside, and where it all came from.

One HTML file that opens offline: pictures and programs inside, no link to anywhere. Every text from outside is escaped,
and the page allows no script but its own, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image as Picture

from medmamba.errors import REASON_CODES
from medmamba.files import write_bytes
from medmamba.grid import Grid
from pipelines.pages.view3d import labels_view, niivue_script
from pipelines.report import Report

PAGE = "report.html"
LARGE, SMALL = (900, 82), (560, 72)  # width in pixels, JPEG quality
LARGE_PICTURES, ALL_PICTURES = 100, 500  # the most suspicious cases get large pictures, later ones none
VIEWS = 20  # the most suspicious cases get a 3D view
ENOUGH_CASES = 5  # below this, volumes are not compared
LEAST_SPREAD = 0.05  # of the volume: a run of near-equal volumes does not make every case an outlier
NOTABLE, LARGEST_Z = 3.0, 10.0
EMPTY_POINTS, ABSENT_POINTS, BORDER_POINTS, PIECES_POINTS, WARNING_POINTS = 10.0, 5.0, 3.0, 2.0, 1.0
DISAGREEMENT_POINTS = 0.1  # a percent of a bit, the mean over the label where it is largest
NOTABLE_DISAGREEMENT = 20.0
TABLE_LABELS = 6

ADVICE = {
    "unsupported_format": "Convert it to NIfTI (.nii or .nii.gz), or take it out of the input folder.",
    "corrupt_file": "Copy the file again from where it came from.",
    "missing_file": "Correct the manifest or bring the file back.",
    "permission": "Give the user that runs the batch the right to read the file.",
    "bad_header": "Repair the header or export the image again.",
    "bad_geometry": "Export the image again; its affine cannot be used.",
    "missing_slice": "Fetch the series again; the message says which slice is missing.",
    "duplicate_slice": "Remove the copies, or split the series.",
    "uneven_slices": "Resample the series onto even slices and give it as NIfTI.",
    "gantry_tilt": "Look at the positions in the headers; no gantry leans so far.",
    "mixed_orientations": "Give the slices of one orientation as one series.",
    "mixed_series": "Give one series a case: in a folder of its own, or by its SeriesInstanceUID.",
    "localizer": "Take the localizer out of the series.",
    "no_overlap": "Choose two scenes of the same place.",
    "misregistered": "Register the two scenes onto each other first.",
    "grid_mismatch": "Resample the files of this case onto one grid.",
    "missing_channel": "Add the missing file, or use a bundle that does not need it.",
    "wrong_channels": "Give one 3D (or 2D) image per role, as the bundle wants.",
    "non_finite": "Look for NaN or infinite values and export the image again.",
    "wrong_units": "Check the units and the scaling of the file against the bundle's card.",
    "empty_image": "Nothing is to be seen in this image; take it out or export it again.",
    "too_large": "Use a machine with more memory, or give the batch more with --ram.",
    "no_space": "Free some disk; then run the batch with --retry no_space.",
    "output_mismatch": "Check the disk; then run the batch with --retry output_mismatch.",
    "killed": "Look at its size against the memory of the machine; then run the batch with --retry killed.",
    "internal_error": "Report it with the traceback in the log; then run the batch with --retry internal_error.",
}


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """How much a case should be looked at first: `points` and the reasons that add up to them."""

    points: float
    reasons: tuple[str, ...]


def write_report(folder: Path, reports: list[Report], set_aside: list[Report], title: str) -> Path:
    """Writes `report.html` into `folder`, where the pictures named in `reports[i].outputs` lie; returns its path."""
    suspicions = judge(reports)
    order = sorted(range(len(reports)), key=lambda i: (-suspicions[i].points, reports[i].case))
    viewer = niivue_script()
    views = VIEWS if viewer else 0
    cards = [_card(folder, reports[i], suspicions[i], place, place < views) for place, i in enumerate(order)]
    scripts = [viewer] if viewer and any(card["view"] for card in cards) else []
    scripts.append((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
    labels = list(dict.fromkeys(row["name"] for card in cards for row in card["labels"]))
    page = (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            cards=cards,
            labels=labels if len(labels) <= TABLE_LABELS else [],
            aside=[_aside(r) for r in sorted(set_aside, key=lambda r: (r.code or "", r.case))],
            provenance=provenance([*reports, *set_aside]),
            viewer=viewer is not None,
            scripts=scripts,
            allowed=" ".join(f"'sha256-{sha256(script)}'" for script in scripts),
            pictures=ALL_PICTURES,
            enough=ENOUGH_CASES,
            points={
                "empty": EMPTY_POINTS,
                "absent": ABSENT_POINTS,
                "border": BORDER_POINTS,
                "pieces": PIECES_POINTS,
                "warning": WARNING_POINTS,
                "disagreement": DISAGREEMENT_POINTS,
            },
            notable=NOTABLE,
            largest=LARGEST_Z,
            spread=f"{LEAST_SPREAD:.0%}",
        )
    )
    path = folder / PAGE
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def judge(reports: list[Report]) -> list[Suspicion]:
    """One Suspicion a case, in the order given; volumes are compared with the training cohort where the bundle knows
    it, else with the other cases of this run."""
    compared = _robust_z(reports) if len(reports) >= ENOUGH_CASES else {}
    return [_judge(r, _against_training(r, compared.get(i, {})), i in compared) for i, r in enumerate(reports)]


def _against_training(report: Report, z: Mapping[str, float]) -> dict[str, float]:
    """The z by label, that against the training cohort where prediction has found one; 0 for a label that most of the
    cohort and this case lack."""
    known = [row for row in _labels(report).values() if row.get("training")]
    rare = {row["name"] for row in known if not row["voxels"] and 2 * row["training"]["n"] < row["training"]["cases"]}
    kept = {name: value for name, value in z.items() if name not in {row["name"] for row in known}}
    found = {row["name"]: float(row["volume_z"]) for row in known if row["volume_z"] is not None}
    return kept | found | dict.fromkeys(rare, 0.0)


def _judge(report: Report, z: Mapping[str, float], compared: bool) -> Suspicion:
    rows = _labels(report).values()
    points, reasons = 0.0, []
    if rows and not any(row["voxels"] for row in rows):
        return Suspicion(points=EMPTY_POINTS + WARNING_POINTS * len(report.warnings), reasons=("no label at all",))
    if z:
        name, value = max(z.items(), key=lambda item: abs(item[1]))
        points += min(abs(value), LARGEST_Z)
        if abs(value) >= NOTABLE:
            reasons.append(f"{name} is unusually {'large' if value > 0 else 'small'} (z {value:+.1f})")
    for row in rows:
        known = row.get("training")
        if (compared or known) and row["name"] not in z and not row["voxels"]:
            points += ABSENT_POINTS
            reasons.append(f"{row['name']} was not found, most {'training cases' if known else 'others'} have it")
        if known and row["pieces"] > known["pieces"] > 0:
            points += PIECES_POINTS
            reasons.append(f"{row['name']} lies in {row['pieces']} pieces, in training at most in {known['pieces']}")
    unsure = max(((row.get("disagreement") or 0.0, row["name"]) for row in rows), default=(0.0, ""))
    points += unsure[0] * DISAGREEMENT_POINTS
    if unsure[0] >= NOTABLE_DISAGREEMENT:
        reasons.append(f"the folds or mirrorings disagree on {unsure[1]} ({unsure[0]:.0f} % of a bit a voxel)")
    cut = [row["name"] for row in rows if row["truncated"]]
    if cut:
        points += BORDER_POINTS
        reasons.append(f"cut by the image border: {', '.join(cut)}")
    if report.warnings:
        points += WARNING_POINTS * len(report.warnings)
        reasons.extend(report.warnings)
    return Suspicion(points=points, reasons=tuple(reasons))


def _robust_z(reports: list[Report]) -> dict[int, dict[str, float]]:
    """Per case and label: (log volume - median) / spread, spread = 1.4826 * MAD, at least LEAST_SPREAD.

    A label found in less than half of the cases is not compared, nor is a case without that label.
    """
    result: dict[int, dict[str, float]] = {i: {} for i in range(len(reports))}
    names = dict.fromkeys(row["name"] for r in reports for row in _labels(r).values())
    for name in names:
        logs = {
            i: math.log(row["volume_ml"])
            for i, r in enumerate(reports)
            for row in _labels(r).values()
            if row["name"] == name and row["volume_ml"] > 0
        }
        if 2 * len(logs) < len(reports) or len(logs) < ENOUGH_CASES:
            for values in result.values():
                values.setdefault(name, 0.0)
            continue
        middle = median(logs.values())
        spread = max(1.4826 * median(abs(v - middle) for v in logs.values()), LEAST_SPREAD)
        for i, value in logs.items():
            result[i][name] = (value - middle) / spread
    return result


def provenance(reports: list[Report]) -> list[tuple[str, str]]:
    """Rows (what, values): each distinct value once, with its number of cases when there is more than one."""
    rows = [("bundle", _distinct([f"{r.bundle.get('name', '?')} {r.bundle.get('id', '?')}" for r in reports]))]
    ceilings = [
        _ceiling_text(r.numbers["interpolation_ceiling"]) for r in reports if "interpolation_ceiling" in r.numbers
    ]
    if ceilings:
        rows.append(("Dice an ideal prediction would have", _distinct(ceilings)))
    wanted = {"code": "code version", "torch": "torch", "python": "Python", "system": "system", "device": "device"}
    for key, words in wanted.items():
        values = [str(r.run[key]) for r in reports if r.run.get(key)]
        if values:
            rows.append((words, _distinct(values)))
    started = sorted(str(r.run["started"]) for r in reports if r.run.get("started"))
    if started:
        rows.append(("cases started", started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"))
    seconds = [float(r.run["seconds"]) for r in reports if r.run.get("seconds") is not None]
    if seconds:
        rows.append(
            ("seconds a case", f"median {median(seconds):.1f}, longest {max(seconds):.1f}, sum {sum(seconds):.0f}")
        )
    memory = [float(r.run["peak_memory_mb"]) for r in reports if r.run.get("peak_memory_mb")]
    if memory:
        rows.append(("peak memory", f"{max(memory):.0f} MiB"))
    return rows


def picture_uri(path: Path, width: int, quality: int) -> str | None:
    """The picture as a JPEG data URI at most `width` pixels wide; None when it is missing or damaged."""
    try:
        with Picture.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError):
        return None
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Picture.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sha256(script: str) -> str:
    """As a content security policy wants it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _card(folder: Path, report: Report, suspicion: Suspicion, place: int, with_view: bool) -> dict[str, Any]:
    picture = None
    if place < ALL_PICTURES:
        width, quality = LARGE if place < LARGE_PICTURES else SMALL
        pictures = _lying_in(folder, report, ".png")
        picture = picture_uri(pictures[0], width, quality) if pictures else None
    names_of = {int(value): str(row["name"]) for value, row in _labels(report).items()}
    labels = _lying_in(folder, report, ".nii.gz")
    ceiling = report.numbers.get("interpolation_ceiling", {})
    return {
        "case": report.case,
        "view": labels_view(labels[0], names_of) if with_view and labels else None,
        "anchor": f"case{place + 1}",
        "points": f"{suspicion.points:.1f}",
        "high": suspicion.points >= NOTABLE,
        "reasons": suspicion.reasons,
        "labels": [_label_row(row, ceiling.get(value)) for value, row in _labels(report).items()],
        "picture": picture,
        "picture_left_out": place >= ALL_PICTURES,
        "grid": _grid_text(report.grid),
        "inputs": [
            (role, str(v.get("path", "?")), str(v.get("sha256", "?"))[:16]) for role, v in report.inputs.items()
        ],
        "outputs": [str(name) for name in report.outputs],
        "seconds": report.run.get("seconds"),
        "group": report.group,
    }


def _lying_in(folder: Path, report: Report, ending: str) -> list[Path]:
    """The products of a report with that ending; none that lies elsewhere, whatever the report says."""
    names = [Path(name) for name in report.outputs if name.endswith(ending)]
    return [folder / name for name in names if not name.is_absolute() and ".." not in name.parts]


def _label_row(row: Mapping[str, Any], ceiling: Mapping[str, Any] | None) -> dict[str, str]:
    mean, std = row.get("intensity_mean"), row.get("intensity_std")
    intensity = "–" if mean is None or std is None else f"{mean:.4g} ± {std:.3g}"
    volume = f"{row['volume_ml']:.4g}" + (" ≥" if row["truncated"] else "")
    z = f"{row['volume_z']:+.1f}" if row.get("volume_z") is not None else "–"
    known = {"name": str(row["name"]), "volume": volume, "z": z, "voxels": f"{row['voxels']}", "intensity": intensity}
    return known | {"ceiling": f"{ceiling['dice']:.3f}" if ceiling else "–"}


def _aside(report: Report) -> dict[str, Any]:
    code = report.code or "internal_error"
    return {
        "case": report.case,
        "code": code,
        "meaning": REASON_CODES.get(code, "a code this version does not know"),
        "files": [str(v.get("path", "?")) if isinstance(v, Mapping) else str(v) for v in report.inputs.values()],
        "message": report.message or "",
        "advice": ADVICE.get(code, "See the message."),
    }


def _labels(report: Report) -> dict[str, Any]:
    return dict(report.numbers.get("labels", {}))


def _grid_text(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    grid = Grid(tuple(values["shape"]), values["affine"], str(values["frame"]))
    spacing = " × ".join(f"{s:.3g}" for s in grid.spacing)
    return f"{' × '.join(str(n) for n in grid.shape)} cells, spacing {spacing} ({grid.frame})"


def _ceiling_text(ceiling: Mapping[str, Any]) -> str:
    return "; ".join(f"{r['name']} {r['dice']:.3f} (lowest {r['lowest']:.3f}, n {r['n']})" for r in ceiling.values())


def _distinct(values: list[str]) -> str:
    found = dict.fromkeys(values)
    return ", ".join(v if len(found) == 1 else f"{v} ({values.count(v)} cases)" for v in found)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
