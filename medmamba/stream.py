"""One image in one piece at the memory of a slab: passes over maps on disk with carried states; no seam, no overlap.

The result is that of the whole image shown to the network at once. Every pass goes over the image slab by slab; maps
between the passes lie in scratch files, and a journal tells which slabs are finished, so that a process that comes
after a kill goes on in the middle. Planning: `medmamba.stream_plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medmamba.files import hash_json
from medmamba.heap import give_back_free_memory
from medmamba.layers.onednn import one_dnn
from medmamba.scratch import Journal, ScratchMap
from medmamba.source import PaddedSource, PermutedSource, Sink, Source
from medmamba.stream_pass import IMAGE, SCORES, Pass, Place, Stream
from medmamba.stream_plan import plan
from medmamba.windows import Window

ROWS = 12  # of the finest map in a slab


@dataclass
class StreamNotes:
    """What the sweep did, for the report: passes, slabs worked in all of them, slabs taken over from before a kill."""

    device: str = ""
    passes: int = 0
    slabs: int = 0
    taken_over: int = 0


def stream(
    network: nn.Module,
    source: Source,
    sink: Sink,
    *,
    scratch: Path,
    key: str = "",
    rows: int = ROWS,
    finished: Callable[[Window], int] = lambda box: 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> StreamNotes:
    """Scores (K, rows, ...) of the whole image to `sink`, slabs in order of axis 0, each pass in slabs of `rows` rows.

    `scratch` is a folder for maps and journal, removed at the end; `key` names what the result is made from: a journal
    under the same key is gone on with. `finished(box)`: the row up to which `sink` already holds the scores of the
    whole image. Raises ConfigError naming a part of the network that cannot stream.
    """
    network = network.to(device).eval()
    shape = source.grid.shape
    with torch.no_grad():
        passes = plan(network, len(source.channels), shape)
        like = next(network.parameters(), torch.empty(0))
        names = [p.name for p in passes]
        journal = Journal(scratch, hash_json([key, names, list(shape), rows, str(like.dtype)]))
        first = finished(Window.whole(shape))
        return _Runner(source, sink, shape, journal, rows, like).run(passes, first, progress)


class _Runner:
    """Passes, one after another, on files of `journal.folder`."""

    def __init__(
        self, source: Source, sink: Sink, shape: tuple[int, ...], journal: Journal, rows: int, like: Tensor
    ) -> None:
        self.source, self.sink, self.shape = source, sink, shape
        self.journal, self.rows, self.like = journal, rows, like
        self.dtype = np.dtype(str(like.dtype).removeprefix("torch."))

    def run(self, passes: list[Pass], first: int, progress: Callable[[int, int], None] | None) -> StreamNotes:
        every = sum(len(p.slabs(self.rows)) for p in passes)
        final = passes[-1]
        written = {(final.name, n) for n, (_, stop) in enumerate(final.slabs(self.rows)) if stop <= first}
        made = self.journal.finished | written
        notes = StreamNotes(str(self.like.device), len(passes), taken_over=len(made))
        for p in passes:
            order = p.order(self.rows)
            due = [number for number in order if (p.name, number) not in made]
            before = len(order) - len(due)
            carried = self._state(p, order[before - 1]) if p.state and 0 < before < len(order) else None
            for number in due:
                carried = self._slab(p, number, carried)
                notes.slabs += 1
                if progress:
                    progress(notes.slabs + notes.taken_over, every)
            for used in p.frees:
                self._map(used).path.unlink(missing_ok=True)
            if p.sweep:
                self._states(p.sweep).path.unlink(missing_ok=True)
            give_back_free_memory()  # the maps of the next pass have other sizes
        self.journal.remove()
        return notes

    def _slab(self, p: Pass, number: int, carried: Tensor | None) -> Tensor | None:
        """One slab of one pass, made to last; gives the state it carries on."""
        slabs = p.slabs(self.rows)
        first, last = slabs[number]
        shown = p.shown((first, last))
        parts = [self._read(stream, *rows) for stream, rows in zip(p.reads, shown, strict=True)]
        at = Place(
            rows=slice(first - shown[0][0], last - shown[0][0]),
            starts=tuple(start for start, _ in shown),
            carried=carried,
            behind=self._state(p.sweep, number + 1) if p.sweep and number + 1 < len(slabs) else None,
            whole=self._last_state(p.sweep) if p.sweep else None,
            sums=tuple(map(self._last_state, p.sums)),
        )
        with one_dnn(parts[0]):
            made, state = p.work(parts, at)
        for stream, tensor in zip(p.writes, made, strict=True):
            self._write(stream, p.part(stream, (first, last))[0], tensor)
        if state is not None:
            self._states(p).write(number, state.cpu().numpy()[None])
        if p.writes[0].name != SCORES:
            self.journal.add(p.name, number)
        return state

    def _read(self, stream: Stream, start: int, stop: int) -> Tensor:
        """Rows of a stream, (1, rows, *plane, C), on the device."""
        if stream.name != IMAGE:
            return torch.from_numpy(self._map(stream).read(start, stop))[None].to(self.like)
        origin = (start, *(0 for _ in stream.space[1:]))
        array = self._image(stream).read(Window(start=origin, size=(stop - start, *stream.space[1:]))).array
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 0, -1)))[None].to(self.like)

    def _image(self, stream: Stream) -> Source:
        """The image as a stream shows it: mirrored, then padded at the far ends."""
        flips = [axis in stream.turn for axis in range(len(self.shape))]
        seen = PermutedSource(self.source, range(len(flips)), flips) if any(flips) else self.source
        lacking = [padded - n for padded, n in zip(stream.space, self.shape, strict=True)]
        return PaddedSource(seen, [0] * len(lacking), lacking) if any(lacking) else seen

    def _write(self, stream: Stream, start: int, tensor: Tensor) -> None:
        """Rows of a stream to its scratch file; scores to the sink, without what was padded."""
        array = tensor[0].cpu().numpy()
        if stream.name != SCORES:
            self._map(stream).write(start, array)
            return
        window = Window(start=(start, *(0 for _ in stream.space[1:])), size=array.shape[:-1]).clip(self.shape)
        if min(window.size):
            inside = tuple(slice(n) for n in window.size)
            self.sink.write(window, np.ascontiguousarray(np.moveaxis(array[inside], -1, 0)))

    def _map(self, stream: Stream) -> ScratchMap:
        return ScratchMap(self.journal.folder / f"{stream.name}.map", stream.space[0], stream.row, self.dtype)

    def _states(self, p: Pass) -> ScratchMap:
        """What a pass carries on, a row a slab."""
        dtype = np.dtype(str(p.state_dtype).removeprefix("torch.")) if p.state_dtype else self.dtype
        return ScratchMap(self.journal.folder / f"{p.name}.states", len(p.slabs(self.rows)), p.state, dtype)

    def _state(self, p: Pass, number: int) -> Tensor:
        return torch.from_numpy(self._states(p).read(number, number + 1)[0]).to(self.like.device)

    def _last_state(self, p: Pass) -> Tensor:
        return self._state(p, p.order(self.rows)[-1])
