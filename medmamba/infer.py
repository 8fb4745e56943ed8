"""The loop of independent windows: source in, finished score slabs out; any rank, memory flat along axis 0."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medmamba.errors import InputError
from medmamba.source import PaddedSource, Sink, Source
from medmamba.windows import Stitcher, Window, Windowing


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

    Slabs arrive in order of axis 0, on the source's grid (padding cropped). `sums` is the accumulator (float64 makes
    constant in = constant out exact). Out of memory halves the batch, then moves to the CPU, then raises
    InputError("too_large"); other errors pass through. `progress(done, all)` is called after each batch.
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
    for group, arrays in _batches(padded, windows, windowing, runner):
        for window, scores in zip(group, runner.scores(arrays), strict=True):
            for slab in stitcher.add(window, scores):
                _write(sink, slab, before, shape)
        done += len(group)
        if progress:
            progress(done, len(windows))
    for slab in stitcher.finish():
        _write(sink, slab, before, shape)
    runner.notes.windows, runner.notes.device, runner.notes.batch = len(windows), str(runner.device), runner.batch
    return runner.notes


def _batches(
    source: Source, windows: list[Window], windowing: Windowing, runner: _Runner
) -> Iterator[tuple[list[Window], list[np.ndarray | None]]]:
    """Windows and their arrays in groups of the runner's present batch; None for a window that is skipped."""
    at = 0
    while at < len(windows):
        group = windows[at : at + runner.batch]
        at += len(group)
        arrays: list[np.ndarray | None] = []
        for window in group:
            image = source.read(window)
            empty = windowing.skip_below is not None and (
                (image.valid is not None and not image.valid.any()) or float(image.array.max()) <= windowing.skip_below
            )
            arrays.append(None if empty else image.array)
        yield group, arrays


class _Runner:
    """The network on a device, with the memory ladder: halve the batch, then the CPU, then `too_large`."""

    def __init__(self, network: nn.Module, device: torch.device, batch: int) -> None:
        self.network, self.device, self.batch = network.to(device).eval(), device, batch
        self.notes = InferNotes()

    def scores(self, arrays: list[np.ndarray | None]) -> Iterator[Tensor | None]:
        """Scores (K, *w) on the CPU, one a window; None for a skipped one."""
        full = [np.ascontiguousarray(a, dtype=np.float32) for a in arrays if a is not None]
        self.notes.skipped += len(arrays) - len(full)
        results: Iterator[Tensor] = iter(self._forward(torch.from_numpy(np.stack(full))) if full else [])
        for array in arrays:
            yield None if array is None else next(results)

    def _forward(self, patches: Tensor) -> Tensor:
        while True:
            try:
                with torch.inference_mode():
                    parts = [self.network(p.to(self.device)).float().cpu() for p in patches.split(self.batch)]
                return torch.cat(parts)
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
