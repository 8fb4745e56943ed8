"""Maps on disk that survive a kill: rows in scratch files, what is finished in a journal.

Order of a slab: rows written, files fsynced, one line in the journal, journal fsynced. Whoever comes after with the
same key goes on behind the last line; at most one slab is done twice. Nothing is memory-mapped: the peak stays flat.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmamba.errors import InputError
from medmamba.files import MODE, step, sync_folder


class ScratchMap:
    """`rows` rows of shape `row` and `dtype` in a file; read and written by rows."""

    def __init__(self, path: Path, rows: int, row: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.rows, self.row, self.dtype = path, rows, tuple(row), np.dtype(dtype)
        self.row_bytes = int(np.prod(self.row, dtype=object)) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, (stop - start, *row)."""
        count = (stop - start) * self.row_bytes // self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, count=count, offset=start * self.row_bytes)
        return values.reshape(stop - start, *self.row)

    def write(self, start: int, array: np.ndarray, first: int = 0) -> None:
        """Makes rows from `start` on last, (rows, *row), or of their last axis only the cells from `first` on. Raises
        InputError("no_space")."""
        array = np.ascontiguousarray(array, self.dtype)
        whole = array.shape[1:] == self.row
        runs = array.reshape(1, -1) if whole else array.reshape(-1, array.shape[-1])
        apart = self.row[-1] * self.dtype.itemsize
        begin = start * self.row_bytes + first * self.dtype.itemsize
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, MODE)
        try:
            for number, run in enumerate(runs):
                data, at = run.data.cast("B"), begin + number * apart
                while len(data):
                    written = os.pwrite(file, data, at)
                    data, at = data[written:], at + written
            os.fdatasync(file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise InputError("no_space", f"{self.path}: scratch does not fit on the disk; free some") from error
        finally:
            os.close(file)


class Journal:
    """Finished slabs of named passes in a scratch folder; a folder made under another `key` is emptied first."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.path = folder, folder / "journal"
        head = json.dumps({"key": key})
        lines = self._lines()
        if not lines or lines[0] != head:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            lines = [head]
            self.path.write_text(head + "\n")
            sync_folder(folder)
        self.finished = {tuple(json.loads(line)) for line in lines[1:]}

    def add(self, name: str, slab: int) -> None:
        """A slab of a pass is whole: said so that it lasts."""
        log = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(log, (json.dumps([name, slab]) + "\n").encode())
            os.fdatasync(log)
        finally:
            os.close(log)
        self.finished.add((name, slab))
        step("journal", self.path)

    def remove(self) -> None:
        """Deletes the journal first: without it the scratch files mean nothing."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lines(self) -> list[str]:
        """Whole lines; a torn last one is cut off."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(self.path, len(whole))
        return whole.decode().splitlines()
