"""The voxels of a file as a memory map, scaled when they are read; gzip goes through a scratch file."""

from __future__ import annotations

import gzip
import mmap
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medmamba.errors import InputError
from medmamba.formats.opening import is_gzip, one_line, require_numbers
from medmamba.windows import Window

PIECE = 1 << 18


@dataclass(kw_only=True)
class Mapped:
    """An array `shape` (C, z, y, x) of type `stored` from byte `offset` of `data`; value = stored * slope + inter, with
    `slope` and `inter` numbers or (C,). `path` is the file that messages name. Mapped at the first read."""

    path: Path
    data: Path
    stored: np.dtype
    offset: int
    shape: tuple[int, ...]
    slope: float | np.ndarray = 1.0
    inter: float | np.ndarray = 0.0
    _array: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require_numbers(self.path, self.stored)
        self._slope, self._inter = (np.reshape(v, (-1, 1, 1, 1)).astype(np.float64) for v in (self.slope, self.inter))
        self.scaled = bool((self._slope != 1).any() or (self._inter != 0).any())

    @property
    def dtype(self) -> np.dtype:
        """float32 when scaled, else the stored type in this machine's byte order."""
        return np.dtype("float32") if self.scaled else self.stored.newbyteorder("=")

    def read(self, window: Window) -> np.ndarray:
        """(C, *window.size), a copy."""
        if self._array is None:
            self._array = memory_map(self.data, self.stored, self.offset, self.shape)
        values = np.array(self._array[(slice(None), *window.slices)])
        self._array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # a long file must not fill the memory
        if self.scaled:
            values = values.astype(np.float64) * self._slope + self._inter
        return values.astype(self.dtype, copy=False)

    def close(self) -> None:
        """Lets the memory map and its scratch file go."""
        self._array = None


def memory_map(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only map; a gzip file is unpacked first. Raises InputError("corrupt_file") when it holds too little."""
    if is_gzip(path):
        expected = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
        with tempfile.TemporaryFile() as scratch:  # has no name: gone with the process, however that ends
            unpack(path, scratch, expected)  # type: ignore[arg-type]
            return np.memmap(scratch, dtype=dtype, mode="r", offset=offset, shape=shape)
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (ValueError, OSError) as error:
        raise InputError(
            "corrupt_file", f"{path}: fewer voxels than the header claims ({one_line(error)}); copy it again"
        ) from None


def unpack(path: Path, scratch: BinaryIO, expected: int) -> None:
    """A gzip file into `scratch`; read to the end so that the check sum is verified, no more than `expected` kept."""
    written = 0
    try:
        with gzip.open(path, "rb") as packed:
            while piece := packed.read(PIECE):
                scratch.write(piece[: max(0, expected - written)])
                written += len(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            "corrupt_file", f"{path}: damaged gzip after {written} bytes ({one_line(error)}); copy it again"
        ) from None
    if written < expected:
        raise InputError(
            "corrupt_file", f"{path}: {written} bytes unpacked, the header claims {expected}; copy it again"
        )
    scratch.flush()
