"""The interpolation ceiling: what Dice a network without fault would reach through a contract's spacing and back.

The labels are brought onto the network's grid as training sees them, shown as certain scores, and sent back as every
prediction is. What is lost on the way no training can win; a bundle's card holds it and every report quotes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmamba.preprocessing import Preprocessing, slabs
from medmamba.source import ArraySink, FileSource, Sink, whole_labels
from medmamba.windows import Window
from pipelines.cases.formats import open_source

MOST_CASES = 20  # of a cohort, evenly taken; the figure is a property of spacing and shapes, not of a case


class _Values:
    """A sink wearing a sink: certain scores in, the values they stand for out."""

    def __init__(self, sink: Sink, values: Sequence[int]) -> None:
        self.sink, self.values = sink, np.array([0, *values], dtype=np.int32)

    def write(self, window: Window, array: np.ndarray) -> None:
        self.sink.write(window, self.values[array.argmax(0)][None])

    def close(self) -> None:
        self.sink.close()


def round_trip(source: FileSource, contract: Preprocessing, values: Sequence[int]) -> np.ndarray:
    """Labels (*space) of a label file after the way to the network's grid and back; other values become 0."""
    back = ArraySink(1, source.grid.shape, "int32")
    sink = contract.inverse(_Values(back, values), source.grid)
    seen = contract.labels_forward(source)
    for window in slabs(seen.grid.shape):
        labels = seen.read(window).array[0]
        scores = np.stack([labels == value for value in values]).astype(np.float32)
        sink.write(window, np.concatenate([1 - scores.sum(0, keepdims=True), scores]))
    sink.close()
    return back.array[0]


def interpolation_ceiling(
    labels: Sequence[Path], contract: Preprocessing, values: Mapping[int, str]
) -> dict[str, dict[str, float | str | int]]:
    """Per label value: name, mean and lowest Dice of the round trip over the files that hold it, and how many do."""
    taken = [labels[i] for i in np.linspace(0, len(labels) - 1, min(len(labels), MOST_CASES)).astype(int)]
    scores: dict[int, list[float]] = {value: [] for value in values}
    for path in taken:
        source = open_source(path)
        truth, again = whole_labels(source), round_trip(source, contract, tuple(values))
        source.close()
        for value, found in scores.items():
            a, b = truth == value, again == value
            if a.any():
                found.append(float(2 * (a & b).sum() / (a.sum() + b.sum())))
    return {
        str(value): {"name": values[value], "dice": float(np.mean(s)), "lowest": min(s), "n": len(s)}
        for value, s in scores.items()
        if s
    }
