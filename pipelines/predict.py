"""One case from files to products: open, preprocess, infer, inverse, decode, write, report last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medmamba.bundle import Bundle
from medmamba.errors import InputError
from medmamba.files import hash_file, hash_json
from medmamba.formats.nifti import NiftiSource, write_labels
from medmamba.infer import infer
from medmamba.source import ArraySink, PermutedSource
from medmamba.windows import Window
from pipelines.case import Case
from pipelines.contents import content_hash, printable
from pipelines.formats import open_source
from pipelines.networks import NETWORKS
from pipelines.pages.preview import preview_png
from pipelines.report import Report, case_key, machine, now, peak_memory_mb
from pipelines.tasks import build_task
from pipelines.tasks.segmentation import SUFFIX, Segmentation


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A bundle ready to run: network built once, device chosen, task known; used for every case of a run."""

    bundle: Bundle
    network: nn.Module
    task: Segmentation
    device: torch.device
    batch: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls, bundle: Bundle, *, device: str = "auto", batch: int = 1, run: Mapping[str, Any] | None = None
    ) -> Predictor:
        network = bundle.build(NETWORKS)
        task = build_task(bundle.task)
        return cls(
            bundle=bundle, network=network, task=task, device=choose_device(device), batch=batch, run=dict(run or {})
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one; any other name is torch's."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_path(output: Path, bundle: Bundle, case_id: str, ending: str) -> Path:
    """Where a product of a case lies: `<output>/<bundle name>-<id8>/<case>_dseg<ending>`."""
    return output / bundle.title / f"{case_id}_{SUFFIX}{ending}"


def predict_labels(
    predictor: Predictor, sources: Mapping[str, NiftiSource], progress: Callable[[int, int], None] | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Written labels (z, y, x) int32 on the first role's own grid, and what the window loop did."""
    preprocessing = predictor.bundle.preprocessing
    grid = sources[preprocessing.roles[0]].grid if preprocessing.roles[0] in sources else None
    try:
        seen = preprocessing.forward(sources)
    except InputError as error:
        files = ", ".join(printable(s.path) for s in sources.values())
        raise InputError(error.code, f"{files}: {error}") from None
    assert grid is not None
    labels = ArraySink(1, grid.shape, "int32")
    sink = preprocessing.inverse(DecodeSink(predictor.task, labels), grid)
    notes = infer(
        predictor.network,
        seen,
        sink,
        classes=predictor.bundle.classes,
        windowing=preprocessing.windowing,
        device=predictor.device,
        batch=predictor.batch,
        progress=progress,
    )
    sink.close()
    return labels.array[0], vars(notes)


class DecodeSink:
    """A sink wearing a sink: scores in, written labels out."""

    def __init__(self, task: Segmentation, sink: ArraySink) -> None:
        self.task, self.sink = task, sink

    def write(self, window: Window, array: np.ndarray) -> None:
        self.sink.write(window, self.task.decode(array))

    def close(self) -> None:
        self.sink.close()


def predict(
    predictor: Predictor, case: Case, output: Path, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Runs one case and writes `<case>_dseg.nii.gz`, `.png` and, last, `.json` (the report), each atomically.

    Raises InputError for a bad case (nothing of it is left but what was whole); other errors are ours.
    """
    started, began = time.perf_counter(), now()
    bundle = predictor.bundle
    sources = {role: open_source(path) for role, path in case.files.items()}
    inputs = {role: told(path) for role, path in case.files.items()}
    first = sources.get(bundle.preprocessing.roles[0]) or next(iter(sources.values()))
    check_disk(output, first)
    labels, notes = predict_labels(predictor, sources, progress)
    numbers = predictor.task.summary(labels, first)
    label_path = product_path(output, bundle, case.id, ".nii.gz")
    write_labels(label_path, labels, first, names=predictor.task.written_names)
    picture = product_path(output, bundle, case.id, ".png")
    preview_png(
        picture, canonical(first, bundle), canonical_labels(labels, first, bundle), predictor.task.written_names
    )
    warnings = [*notes["steps"]]
    extra = sorted(set(case.files) - set(bundle.preprocessing.roles))
    if extra:
        warnings.append(f"roles {extra} are not used by this bundle")
    if not labels.any():
        warnings.append("empty output: no voxel was given a label")
    report = Report(
        case=case.id,
        key=case_key({r: str(v["sha256"]) for r, v in inputs.items() if r in bundle.preprocessing.roles}, bundle),
        status="done",
        bundle={"name": bundle.name, "id": bundle.id},
        inputs=inputs,
        outputs={p.name: {"size": p.stat().st_size, "sha256": hash_file(p)} for p in (label_path, picture)},
        grid={"shape": list(first.grid.shape), "affine": first.grid.affine.tolist(), "frame": first.grid.frame},
        numbers=numbers,
        warnings=tuple(warnings),
        group=case.group,
        run={
            **predictor.run,
            **machine(),
            "device": notes["device"],
            "windows": notes["windows"],
            "windows_skipped": notes["skipped"],
            "batch": notes["batch"],
            "started": began,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "settings": hash_json(dict(bundle.task)),
        },
    )
    report.save(product_path(output, bundle, case.id, ".json"))
    return report


def told(path: Path) -> dict[str, Any]:
    """A file as the report names it."""
    return {"path": printable(path), "size": path.stat().st_size, "sha256": content_hash(path)}


def check_disk(output: Path, source: NiftiSource) -> None:
    """Raises InputError("no_space") when the products (at most 6 bytes a voxel) would not fit on the disk."""
    output.mkdir(parents=True, exist_ok=True)
    needed = 6 * int(np.prod(source.grid.shape)) + 2**20
    free = shutil.disk_usage(output).free
    if free < needed:
        raise InputError(
            "no_space", f"{output}: {free >> 20} MiB free, this case needs {needed >> 20} MiB; free some disk"
        )


def canonical(source: NiftiSource, bundle: Bundle) -> PermutedSource:
    """The image with its axes turned for looking at."""
    return PermutedSource(source, *bundle.preprocessing.axes(source.grid))


def canonical_labels(labels: np.ndarray, source: NiftiSource, bundle: Bundle) -> np.ndarray:
    """Labels turned as `canonical` turns the image."""
    order, flips = bundle.preprocessing.axes(source.grid)
    return labels.transpose(order)[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
