"""The DICOM segmentation beside the label NIfTI, for a case that came from DICOM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.bundle import Bundle
from medmamba.errors import ConfigError, InputError
from medmamba.formats.dicom import DicomSource
from medmamba.formats.dicom_seg import KINDS, Segments, write_seg
from medmamba.source import FileSource
from pipelines.pages.preview import colour


def require_seg_kind(kind: str) -> str:
    """`kind` when it is known: labelmap, binary or none. Raises ConfigError."""
    if kind not in (*KINDS, "none"):
        raise ConfigError(f"--dicom-seg {kind!r} unknown; known: {', '.join(KINDS)}, none")
    return kind


def write_dicom(
    path: Path,
    labels: np.ndarray,
    source: FileSource,
    bundle: Bundle,
    names: Mapping[int, str],
    *,
    key: str,
    kind: str,
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Writes `path` when `source` is a DICOM series: the file written, if any, and what must be told.

    Codes come from the bundle's task: `codes` {"1": {"type": [scheme, value, meaning], "category": ...}} by class.
    A series whose headers allow no segmentation keeps its NIfTI and a warning.
    """
    path.unlink(missing_ok=True)
    if kind == "none" or not isinstance(source, DicomSource):
        return (), ()
    told = {v: n for v, n in names.items() if v}
    segments = Segments(
        names=told,
        maker=bundle.name,
        version=bundle.id[:16],
        codes=label_codes(bundle.task),
        colours={v: colour(v) for v in told},
    )
    try:
        write_seg(path, labels, source, segments, key=key, kind=kind)
    except InputError as error:
        if error.code == "output_mismatch":
            raise
        return (), (f"no DICOM SEG, the labels are in the NIfTI alone: {error}",)
    return (path,), ()


def label_codes(task: Mapping[str, Any]) -> dict[int, dict[str, tuple[str, str, str]]]:
    """Codes by written value from a bundle's task entry, empty when it names none."""
    values = {int(k): int(v) for k, v in task.get("values", {}).items()}
    codes: dict[int, dict[str, tuple[str, str, str]]] = {}
    for label, entry in task.get("codes", {}).items():
        triples = {part: tuple(map(str, triple)) for part, triple in entry.items()}
        if "type" not in triples or any(len(t) != 3 for t in triples.values()):
            raise ConfigError(f'codes of label {label}: {entry}; expected {{"type": [scheme, value, meaning]}}')
        codes[values.get(int(label), int(label))] = triples  # type: ignore[assignment]
    return codes
