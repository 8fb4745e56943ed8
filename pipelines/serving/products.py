"""What a finished label map becomes: the files of a case, where each lies, and the numbers of its report.

Beside the labels at most 6 bytes a voxel stand at once, whatever the number of classes: components of the cleaning and
of the page's warnings are the largest part, what is read back comes plane by plane or as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.bundle import Bundle
from medmamba.files import hash_file
from medmamba.formats.nifti import write_labels, write_map
from medmamba.source import FileSource
from pipelines.cases.case import Case
from pipelines.learning.expected import compare
from pipelines.pages.preview import preview_png
from pipelines.serving.dicom_out import write_dicom
from pipelines.serving.uncertainty import tell
from pipelines.tasks import task_class
from pipelines.tasks.segmentation import Segmentation

DISAGREEMENT = "disagreement"


@dataclass(frozen=True, kw_only=True)
class Products:
    """`files` written, in order, `numbers` of the report, and what must be told."""

    files: tuple[Path, ...]
    numbers: Mapping[str, Any]
    warnings: tuple[str, ...]


def product_path(output: Path, bundle: Bundle, case: Case, ending: str) -> Path:
    """Where a product of a case lies: `<output>/<bundle name>-<id8>/<case>_dseg<ending>`, or as its task and the layout
    that the case comes from name it."""
    name = case.product_name(task_class(bundle.task).suffix, maker=bundle.name)
    return output / bundle.title / f"{name}{ending}"


def outputs_of(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The `outputs` of a report: each file by its name below the bundle's folder, with size and hash."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)} for path in files
    }


def map_path(output: Path, bundle: Bundle, case: Case) -> Path:
    """Where the map lies that says where folds or mirrorings disagree, in percent of a bit."""
    return output / bundle.title / f"{case.product_name(DISAGREEMENT, maker=bundle.name, main=False)}.nii.gz"


def write_products(
    output: Path,
    bundle: Bundle,
    task: Segmentation,
    case: Case,
    source: FileSource,
    labels: np.ndarray,
    disagreement: np.ndarray | None = None,
    *,
    key: str,
    dicom_seg: str = "labelmap",
) -> Products:
    """Writes the cleaned `labels` (z, y, x) of a case on the grid of `source`: NIfTI, for DICOM a segmentation of the
    kind `dicom_seg`, a picture, and the map of the `disagreement` in percent where there is one. Each file atomically.
    """
    numbers = task.summary(labels, source)
    compare(numbers["labels"], labels, bundle.card.get("expected", {}))
    if "interpolation_ceiling" in bundle.card:
        numbers["interpolation_ceiling"] = bundle.card["interpolation_ceiling"]
    label_path = product_path(output, bundle, case, ".nii.gz")
    write_labels(label_path, labels, source, names=task.written_names)
    files = [label_path]
    if disagreement is not None:
        tell(numbers["labels"], labels, disagreement)
        files.append(map_path(output, bundle, case))
        write_map(files[-1], disagreement, source)
    dicom, warnings = write_dicom(
        product_path(output, bundle, case, ".dcm"),
        labels,
        source,
        bundle,
        task.written_names,
        key=key,
        kind=dicom_seg,
    )
    picture = product_path(output, bundle, case, ".png")
    preview_png(picture, source, labels, task.written_names)
    return Products(files=(*files, *dicom, picture), numbers=numbers, warnings=warnings)
