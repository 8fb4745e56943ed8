"""Writes a raster and dies at its n-th durable step, for every n; then goes on. A process of its own that forks.

Usage: python -m tests.geo.kill_driver FOLDER. Prints one JSON list of {n, step, redone, sha256}; the last one, n = 0,
was never killed. `redone` counts slabs that were written although an earlier process had finished them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

import geo.formats.geotiff
import medmamba.scratch
from geo.formats.geotiff import CogSink, class_layer
from medmamba.files import hash_file
from medmamba.windows import Window
from tests.geo.maker import grid, texture

SHAPE, DEPTH = (400, 600), 100
CODES = (texture(SHAPE, seed=3) * 6).astype("uint8") % 4


def run(path: Path) -> int:
    """One process: goes on behind what is finished; returns the slabs it wrote."""
    sink = CogSink(path, grid(SHAPE), class_layer({0: "none", 1: "built"}, {1: (200, 0, 0)}), key="pair and bundle")
    first = sink.finished(Window.whole(SHAPE))
    for row in range(first, SHAPE[0], DEPTH):
        sink.write(Window(start=(row, 0), size=(DEPTH, SHAPE[1])), CODES[:, row : row + DEPTH])
    sink.close()
    return (SHAPE[0] - first) // DEPTH


def die_at(n: int, log: Path) -> None:
    """The n-th durable step is told to `log`, then the process is gone."""
    count = 0

    def step(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == n:
            log.write_text(name)
            os._exit(9)

    write = medmamba.scratch.ScratchMap.write

    def write_then_step(rows: medmamba.scratch.ScratchMap, start: int, array: np.ndarray, first: int = 0) -> None:
        write(rows, start, array, first)
        step("scratch", rows.path)

    medmamba.scratch.ScratchMap.write = write_then_step
    medmamba.scratch.step = geo.formats.geotiff.step = step


def fork(path: Path, n: int, log: Path) -> int:
    child = os.fork()
    if child == 0:
        die_at(n, log)
        run(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    told, n = [], 0
    while True:
        n += 1
        path, log = folder / f"{n}" / "a.tif", folder / f"{n}.log"
        path.parent.mkdir()
        if fork(path, n, log) == 0:
            break
        step = log.read_text()
        finished = (n - 1) // 2 if step in ("scratch", "journal") else SHAPE[0] // DEPTH  # journalled before it died
        redone = 0 if step == "renamed" else run(path) - (SHAPE[0] // DEPTH - finished)
        left = sorted(p.name for p in path.parent.iterdir())
        told.append({"n": n, "step": step, "redone": redone, "sha256": hash_file(path), "left": left})
    path = folder / "whole.tif"
    run(path)
    told.append({"n": 0, "step": "", "redone": 0, "sha256": hash_file(path), "left": ["a.tif"]})
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]))
