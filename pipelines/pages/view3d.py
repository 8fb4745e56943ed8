"""The 3D view of a page: NiiVue from the installed ipyniivue package, and a case's labels made small enough for it.

Nothing is fetched: the program and the labels stand inside the page. Without the package a page has no 3D view.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.errors import MedMambaError
from medmamba.formats.nifti import label_bytes
from medmamba.grid import RAS, Grid
from pipelines.cases.formats import read_labels
from pipelines.pages.preview import colour

LARGEST_SIDE = 128  # cells of an axis that are shown
MOST_LABELS = 254
MADE = re.compile(r'Creating new Niivue instance"\).{0,300}?=new ([\w$]+)\(', re.DOTALL)
EXPORT = re.compile(r"export\s*\{[^}]*\}\s*;?\s*$")


def niivue_script() -> str | None:
    """NiiVue as one module that defines `Niivue`; None when ipyniivue is missing or not built as expected."""
    package = find_spec("ipyniivue")
    places = package.submodule_search_locations if package else None
    file = Path(next(iter(places))) / "static" / "widget.js" if places else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    made = MADE.search(text)
    if made is None or EXPORT.search(text) is None:
        return None
    text = EXPORT.sub("", text) + f"globalThis.Niivue={made.group(1)};"
    return text.replace("</script", "<\\/script")


def labels_view(path: Path, names: Mapping[int, str]) -> dict[str, Any] | None:
    """A label file for `page.js`: every n-th voxel as base64 `.nii.gz` of label numbers 1.., and their colours.

    None when there is nothing to be seen: no file, no label, too many, or no place in a body.
    """
    try:
        labels, grid = read_labels(path)
    except (MedMambaError, OSError):
        return None
    values = [int(v) for v in np.unique(labels) if v]
    if not values or len(values) > MOST_LABELS or grid.rank != 3 or grid.frame != RAS:
        return None
    step = -(-max(labels.shape) // LARGEST_SIDE)
    thin = np.searchsorted([0, *values], labels[::step, ::step, ::step]).astype(np.uint8)
    affine = grid.affine.copy()
    affine[:3, :3] *= step
    colours = [(0, 0, 0), *(tuple(round(255 * c) for c in colour(v)) for v in values)]
    return {
        "volume": base64.b64encode(label_bytes(thin, Grid(thin.shape, affine, RAS))).decode(),
        "colours": {
            **{letter: [c[i] for c in colours] for i, letter in enumerate("RGB")},
            "A": [0] + [255] * len(values),
            "labels": ["", *(names.get(v, str(v)) for v in values)],
        },
    }
