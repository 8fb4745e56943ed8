"""Where the members of a bundle disagree: a map beside the labels and its mean inside each, in percent of a bit.

The map is one channel after the scores (`medmamba.ensemble.Disagreement`), so it takes the same way back onto the
file's own grid and costs one byte a voxel, whatever the number of classes or members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medmamba.bundle import Bundle
from medmamba.source import ArraySink
from medmamba.windows import Window
from pipelines.tasks import task_class
from pipelines.tasks.segmentation import Segmentation


def disagrees(bundle: Bundle) -> bool:
    """Whether a bundle has members that can disagree, and its task tells how far."""
    return bundle.members > 1 and issubclass(task_class(bundle.task), Segmentation)


class DecodeSink:
    """A sink wearing sinks: scores in, written labels out, and the disagreement in percent where it follows them."""

    def __init__(self, task: Segmentation, classes: int, labels: ArraySink, disagreement: ArraySink | None) -> None:
        self.task, self.classes, self.labels, self.disagreement = task, classes, labels, disagreement

    def write(self, window: Window, array: np.ndarray) -> None:
        self.labels.write(window, self.task.decode(array[: self.classes]))
        if self.disagreement is not None:
            self.disagreement.write(window, np.rint(100 * array[self.classes :]).astype(np.uint8))

    def close(self) -> None:
        self.labels.close()


def tell(rows: Mapping[str, dict[str, Any]], labels: np.ndarray, disagreement: np.ndarray) -> None:
    """Adds to the row of each label of a result (written values as text) `disagreement`, the mean percent in it."""
    sums = dict.fromkeys(rows, 0)
    for plane, percent in zip(labels, disagreement, strict=True):
        for value in sums:
            sums[value] += int(percent[plane == int(value)].sum(dtype=np.int64))
    for value, row in rows.items():
        row["disagreement"] = sums[value] / row["voxels"] if row["voxels"] else None
