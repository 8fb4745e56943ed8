"""One case from files to products: open, preprocess, infer, inverse, decode, write, report last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from medmamba.bundle import Bundle
from medmamba.ensemble import Disagreement
from medmamba.errors import ConfigError, InputError
from medmamba.files import hash_json
from medmamba.infer import infer
from medmamba.source import ArraySink, FileSource, Sink, Source
from medmamba.stream import stream
from medmamba.stream_plan import require_streamable
from medmamba.windows import Window
from pipelines.cases.case import Case
from pipelines.cases.contents import content_hash, printable
from pipelines.cases.formats import open_source, parts_of
from pipelines.cases.state import STATE
from pipelines.layouts.bids import source_uri
from pipelines.networks import NETWORKS
from pipelines.report import Report, case_key, machine, now, peak_memory_mb
from pipelines.serving.budget import predicted_scratch, require_disk, return_large_blocks, take_large_pages
from pipelines.serving.dicom_out import require_seg_kind
from pipelines.serving.headers import product_bytes
from pipelines.serving.products import outputs_of, product_path, write_products
from pipelines.serving.uncertainty import DecodeSink, disagrees
from pipelines.tasks import Task, build_task
from pipelines.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A bundle ready to run: network built once, device chosen, task known; used for every case of a run."""

    bundle: Bundle
    network: nn.Module
    task: Task
    device: torch.device
    batch: int = 1
    mode: str = "windows"
    run: Mapping[str, Any] = field(default_factory=dict)
    dicom_seg: str = "labelmap"  # how a case from DICOM gets its segmentation: labelmap, binary, none

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        device: str = "auto",
        batch: int = 1,
        mode: str = "windows",
        run: Mapping[str, Any] | None = None,
        dicom_seg: str = "labelmap",
    ) -> Predictor:
        require_seg_kind(dicom_seg)
        require_mode(mode)
        return_large_blocks()
        if mode == "windows":
            take_large_pages()
        build = bundle.build_with_disagreement if disagrees(bundle) else bundle.build
        network = build(NETWORKS)
        if mode == "stream":
            require_streamable(network, len(bundle.preprocessing.channels), len(bundle.preprocessing.windowing.size))
        task = build_task(bundle.task)
        return cls(
            bundle=bundle,
            network=network,
            task=task,
            device=choose_device(device),
            batch=batch,
            mode=mode,
            run=dict(run or {}),
            dicom_seg=dicom_seg,
        )

    @property
    def maps(self) -> int:
        """How many scores a cell the network gives: the classes, and their disagreement where it tells one."""
        return self.bundle.classes + isinstance(self.network, Disagreement)


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one; any other name is torch's."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Where a streamed case keeps its maps until it is finished, and the `key` of what they are made from. `strip`
    columns are made at a time by windows; `finished` tells what an earlier process left in the product (see `infer`).
    """

    folder: Path
    key: str
    strip: int | None = None
    finished: Callable[[Window], int] = lambda box: 0


def by_windows(
    predictor: Predictor, source: Source, sink: Sink, scratch: Scratch, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Overlapping windows, blended; what the loop did."""
    notes = infer(
        predictor.network,
        source,
        sink,
        classes=predictor.maps,
        windowing=predictor.bundle.preprocessing.windowing,
        device=predictor.device,
        batch=predictor.batch,
        strip=scratch.strip,
        finished=scratch.finished,
        progress=progress,
    )
    return vars(notes)


def by_stream(
    predictor: Predictor, source: Source, sink: Sink, scratch: Scratch, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """The whole image in one piece, slab by slab; what the sweep did."""
    notes = stream(
        predictor.network,
        source,
        sink,
        scratch=scratch.folder,
        key=scratch.key,
        finished=scratch.finished,
        device=predictor.device,
        progress=progress,
    )
    return vars(notes)


MODES = {"windows": by_windows, "stream": by_stream}


def require_mode(mode: str) -> None:
    """Raises ConfigError for a mode that is not in MODES."""
    if mode not in MODES:
        raise ConfigError(f"--mode {mode!r}: known are {', '.join(MODES)}")


def predict_labels(
    predictor: Predictor,
    sources: Mapping[str, FileSource],
    progress: Callable[[int, int], None] | None = None,
    scratch: Scratch | None = None,
    disagreement: ArraySink | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Written labels (z, y, x) on the own grid of the first role there is, in the smallest type, and what the loop did.

    Without `scratch` nothing of a streamed case outlives the process. `disagreement` takes that of the bundle's members
    in percent, where they tell it.
    """
    preprocessing, task = predictor.bundle.preprocessing, segmentation_of(predictor)
    try:
        grid = sources[preprocessing.present(sources)[0]].grid
        seen = preprocessing.forward(sources)
    except InputError as error:
        files = ", ".join(printable(s.path) for s in sources.values())
        raise InputError(error.code, f"{files}: {error}") from None
    labels = ArraySink(1, grid.shape, task.written(predictor.bundle.classes).dtype)
    sink = preprocessing.inverse(DecodeSink(task, predictor.bundle.classes, labels, disagreement), grid)
    with TemporaryDirectory() as spare:
        place = scratch or Scratch(folder=Path(spare) / "maps", key="")
        notes = MODES[predictor.mode](predictor, seen, sink, place, progress)
    sink.close()
    return task.finish(labels.array[0]), notes


def segmentation_of(predictor: Predictor) -> Segmentation:
    """The predictor's task. Raises ConfigError when it does not label voxels."""
    if not isinstance(predictor.task, Segmentation):
        raise ConfigError(f"bundle {predictor.bundle.title}: task {predictor.bundle.task['name']!r} labels no volumes")
    return predictor.task


def predict(
    predictor: Predictor, case: Case, output: Path, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Runs one case and writes its products (`write_products`: `<case>_dseg.nii.gz` and what lies beside it) and, last,
    the report `<case>_dseg.json`; an input's layout may name them otherwise.

    Each file atomically. Raises InputError for a bad case (nothing of it is left but what was whole); other errors
    are ours.
    """
    started, began = time.perf_counter(), now()
    bundle = predictor.bundle
    sources = {role: open_source(path) for role, path in case.files.items()}
    inputs = {role: told(path) | source_uri(path, case.products) for role, path in case.files.items()}
    key = case_key(
        {r: str(v["sha256"]) for r, v in inputs.items() if r in bundle.preprocessing.roles}, bundle, predictor.mode
    )
    first = next((sources[r] for r in bundle.preprocessing.roles if r in sources), next(iter(sources.values())))
    require_disk(output, product_bytes(first.grid) + 2**20 + predicted_scratch(bundle, case, predictor.mode))
    scratch = Scratch(folder=output / STATE / "stream" / bundle.title / case.id, key=key)
    unsure = ArraySink(1, first.grid.shape, "uint8") if predictor.maps > bundle.classes else None
    labels, notes = predict_labels(predictor, sources, progress, scratch, unsure)
    made = write_products(
        output,
        bundle,
        segmentation_of(predictor),
        case,
        first,
        labels,
        None if unsure is None else unsure.array[0],
        key=key,
        dicom_seg=predictor.dicom_seg,
    )
    told_by_sources = dict.fromkeys(note for source in sources.values() for note in source.notes)
    warnings = [*notes.pop("steps", ()), *told_by_sources, *made.warnings, *doubts(case, bundle, labels)]
    report = Report(
        case=case.id,
        key=key,
        status="done",
        bundle={"name": bundle.name, "id": bundle.id},
        inputs=inputs,
        outputs=outputs_of(output / bundle.title, made.files),
        grid={"shape": list(first.grid.shape), "affine": first.grid.affine.tolist(), "frame": first.grid.frame},
        numbers=made.numbers,
        warnings=tuple(warnings),
        group=case.group,
        run=run_facts(predictor, notes, began, started),
    )
    report.save(product_path(output, bundle, case, ".json"))
    return report


def doubts(case: Case, bundle: Bundle, labels: np.ndarray) -> list[str]:
    """What must be told of roles that lack or are too many, and of a result without a label."""
    roles = bundle.preprocessing.roles
    warnings = []
    if missing := [role for role in roles if role not in case.files]:
        warnings.append(f"roles {missing} are missing; the network learned to do without and was shown 0 there")
    if extra := sorted(set(case.files) - set(roles)):
        warnings.append(f"roles {extra} are not used by this bundle")
    if not labels.any():
        warnings.append("empty output: no voxel was given a label")
    return warnings


def run_facts(predictor: Predictor, notes: Mapping[str, Any], began: str, started: float) -> dict[str, Any]:
    """What a report tells of the run: machine, mode, what the loop did, time since `started` (perf_counter)."""
    return {
        **predictor.run,
        **machine(),
        "mode": predictor.mode,
        **notes,
        "started": began,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "settings": hash_json(dict(predictor.bundle.task)),
    }


def lines_of(report: Report) -> list[str]:
    """A line a label for the terminal."""
    return [
        f"{row['name']:<24} {row['volume_ml']:>12.3f} ml{'  (cut by the border)' if row['truncated'] else ''}"
        for row in report.numbers["labels"].values()
    ]


def told(path: Path, parts: Callable[[Path], tuple[Path, ...]] = parts_of) -> dict[str, Any]:
    """A file as the report names it; `parts` are all files behind it."""
    size = sum(part.stat().st_size for part in parts(path))
    return {"path": printable(path), "size": size, "sha256": content_hash(path, parts_of=parts)}
