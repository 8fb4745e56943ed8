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
from medmamba.layers.onednn import one_dnn
from medmamba.sample import Image
from medmamba.source import PaddedSource, RowCache, Sink, Source, WindowSource
from medmamba.windows import Stitcher, Window, Windowing

Group = tuple[list[Window], list[bool], np.ndarray]
T = TypeVar("T")


@dataclass
class InferNotes:
    """What the loop did, for the report: steps taken when memory ran out, windows computed and skipped."""

    device: str = ""
    batch: int = 0
    windows: int = 0
    windows_skipped: int = 0
    taken_over: int = 0  # windows that an earlier process had done
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
    strip: int | None = None,
    finished: Callable[[Window], int] = lambda box: 0,
    progress: Callable[[int, int], None] | None = None,
) -> InferNotes:
    """Runs `network` (B, C, *w) -> (B, K = `classes`, *w) over all windows; blended scores (K, rows, ...) go to `sink`.

    Slabs arrive in order of axis 0, on the source's grid (padding cropped), float32. Each row of the source is read
    once, the next batch while the network works on this one. `sums` is the accumulator (float64 makes constant in =
    constant out exact). `strip`: about so many columns (axis 1) are made at a time, all rows of them, then the next
    ones, so that memory does not grow with the width either; the scores are the same. `finished(box)`: the row up
    to which an earlier process finished these columns; rows before it are not written, the others are what they would
    have been. Out of memory halves the batch, then moves to the CPU, then raises InputError("too_large"); other errors
    pass through. `progress(done, all)` is called after each batch.
    """
    shape = source.grid.shape
    lacking = [max(w - n, 0) for w, n in zip(windowing.size, shape, strict=True)]
    before = [m // 2 for m in lacking]
    after = [m - b for m, b in zip(lacking, before, strict=True)]
    padded = PaddedSource(source, before, after, windowing.pad) if any(lacking) else source
    runner = _Runner(network, torch.device(device), batch)
    notes, strips = runner.notes, windowing.strips(padded.grid.shape, strip)
    every = sum(len(windowing.windows(seen.size)) for seen, _ in strips)

    def tell() -> None:
        if progress:
            progress(notes.taken_over + notes.windows, every)

    for seen, kept in strips:
        box = kept.moved([-b for b in before]).clip(shape)
        box = box.below(finished(box))
        first = box.start[0] + before[0]
        for window, scores in _slabs(runner, WindowSource(padded, seen), classes, windowing, sums, first, tell):
            _write(sink, window.moved([s - b for s, b in zip(seen.start, before)]), scores, box)
    notes.device, notes.batch = str(runner.device), runner.batch
    return notes


def _slabs(
    runner: _Runner,
    source: Source,
    classes: int,
    windowing: Windowing,
    sums: torch.dtype,
    first: int,
    tell: Callable[[], None],
) -> Iterator[tuple[Window, Tensor]]:
    """Blended scores of `source`, as they become final; windows that end at row `first` or before it were done."""
    windows, notes = windowing.windows(source.grid.shape), runner.notes
    done = sum(w.stop[0] <= first for w in windows) // runner.batch * runner.batch  # whole batches: they round alike
    windows, notes.taken_over = windows[done:], notes.taken_over + done
    if not windows:
        return
    stitcher = Stitcher(classes, source.grid.shape, windowing, sums, windows[0].start[0])
    for group, empty, patches in ahead(_batches(RowCache(source, windowing.size[0]), windows, windowing, runner)):
        scores = runner.scores(patches)
        for window, skipped in zip(group, empty, strict=True):
            yield from stitcher.add(window, None if skipped else scores.pop(0))
        notes.windows, notes.windows_skipped = notes.windows + len(group), notes.windows_skipped + sum(empty)
        tell()
    yield from stitcher.finish()


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
                parts = [self._scored(part.to(self.device)) for part in patches.split(self.batch)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._step_down(error)

    def _scored(self, batch: Tensor) -> Tensor:
        with torch.no_grad(), one_dnn(batch):
            return self.network(batch).float().cpu()

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


def _write(sink: Sink, window: Window, scores: Tensor, box: Window) -> None:
    """Hands on what of a slab lies in `box`; all in coordinates of the image, of which padding is no part."""
    kept = window.within(box)
    if min(kept.size):
        sink.write(kept, scores[(slice(None), *kept.moved([-s for s in window.start]).slices)].numpy())
