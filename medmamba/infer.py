"""The loop of independent windows: source in, finished score slabs out; any rank, memory flat along axis 0."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from medmamba.errors import InputError
from medmamba.sample import Image
from medmamba.source import PaddedSource, RowCache, Sink, Source
from medmamba.windows import Stitcher, Window, Windowing

Group = tuple[list[Window], list[bool], np.ndarray]
T = TypeVar("T")


@dataclass
class InferNotes:
    """What the loop did, for the report: steps taken when memory ran out, windows computed and skipped."""

    device: str = ""
    batch: int = 0
    windows: int = 0
    skipped: int = 0
    steps: list[str] = field(default_factory=list)


def infer(
    network: nn.Module,
    source: Source,
    sink: Sink,
    *,
    classes: int,
    windowing: Windowing,
    device: torch.device | str = "cpu",
    batch: int = 1,
    sums: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> InferNotes:
    """Runs `network` (B, C, *w) -> (B, K = `classes`, *w) over all windows; blended scores (K, rows, ...) go to `sink`.

    Slabs arrive in order of axis 0, on the source's grid (padding cropped), float32. Each row of the source is read
    once, the next batch while the network works on this one. `sums` is the accumulator (float64 makes constant in =
    constant out exact). Out of memory halves the batch, then moves to the CPU, then raises InputError("too_large");
    other errors pass through. `progress(done, all)` is called after each batch.
    """
    shape = source.grid.shape
    lacking = [max(w - n, 0) for w, n in zip(windowing.size, shape, strict=True)]
    before = [m // 2 for m in lacking]
    after = [m - b for m, b in zip(lacking, before, strict=True)]
    padded = PaddedSource(source, before, after, windowing.pad) if any(lacking) else source
    runner = _Runner(network, torch.device(device), batch)
    stitcher = Stitcher(classes, padded.grid.shape, windowing, sums)
    windows = windowing.windows(padded.grid.shape)
    done = 0
    for group, empty, patches in ahead(_batches(RowCache(padded, windowing.size[0]), windows, windowing, runner)):
        scores = runner.scores(patches)
        for window, skipped in zip(group, empty, strict=True):
            for slab in stitcher.add(window, None if skipped else scores.pop(0)):
                _write(sink, slab, before, shape)
        done += len(group)
        runner.notes.skipped += sum(empty)
        if progress:
            progress(done, len(windows))
    for slab in stitcher.finish():
        _write(sink, slab, before, shape)
    runner.notes.windows, runner.notes.device, runner.notes.batch = len(windows), str(runner.device), runner.batch
    return runner.notes


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _batches(source: Source, windows: list[Window], windowing: Windowing, runner: _Runner) -> Iterator[Group]:
    """Windows in groups of the runner's present batch, which of them are empty, and the arrays of the others."""
    at = 0
    while at < len(windows):
        group = windows[at : at + runner.batch]
        at += len(group)
        empty, patches = [], np.empty((len(group), len(source.channels), *windowing.size), np.float32)
        for window in group:
            image = source.read(window)
            empty.append(_is_empty(image, windowing.skip_below))
            if not empty[-1]:
                patches[len(empty) - sum(empty) - 1] = image.array
        yield group, empty, patches[: len(group) - sum(empty)]


def _is_empty(image: Image, skip_below: float | None) -> bool:
    """No valid cell, or no value above the contract's threshold."""
    if image.valid is not None and not image.valid.any():
        return True
    return skip_below is not None and float(image.array.max()) <= skip_below


class _Runner:
    """The network on a device, with the memory ladder: halve the batch, then the CPU, then `too_large`."""

    def __init__(self, network: nn.Module, device: torch.device, batch: int) -> None:
        self.network, self.device, self.batch = network.to(device).eval(), device, batch
        self.notes = InferNotes()

    def scores(self, patches: np.ndarray) -> list[Tensor]:
        """Scores (K, *w) on the CPU, one a patch (C, *w)."""
        return list(self._forward(torch.from_numpy(patches))) if len(patches) else []

    def _forward(self, patches: Tensor) -> Tensor:
        while True:
            try:
                with torch.inference_mode():
                    parts = [self.network(p.to(self.device)).float().cpu() for p in patches.split(self.batch)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._step_down(error)

    def _step_down(self, error: BaseException) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.batch > 1:
            self.batch //= 2
            self.notes.steps.append(f"out of memory on {self.device}: batch {self.batch}")
        elif self.device.type != "cpu":
            self.device = torch.device("cpu")
            self.network.to(self.device)
            self.notes.steps.append("out of memory with batch 1: moved to the CPU")
        else:
            raise InputError(
                "too_large", "one window does not fit in the CPU memory; free memory or train a smaller window"
            ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "not enough memory" in text or "out of memory" in text.lower()


def _write(sink: Sink, slab: tuple[Window, Tensor], before: list[int], shape: tuple[int, ...]) -> None:
    """Hands a slab of the padded image on, in the coordinates of the image itself."""
    window, scores = slab
    moved = Window(start=tuple(s - b for s, b in zip(window.start, before)), size=window.size)
    kept = moved.clip(shape)
    if min(kept.size) == 0:
        return
    cut = tuple(slice(k - m, k - m + n) for k, m, n in zip(kept.start, moved.start, kept.size))
    sink.write(kept, scores[(slice(None), *cut)].numpy())
