"""One volume of a file with several (a 4D NIfTI of the Medical Segmentation Decathlon, a time series), by the address
`FILE/volume=N`, N from 0: what wants one channel a role is given it so, and nothing is split on disk."""

from __future__ import annotations

from pathlib import Path

from medmamba.errors import InputError
from medmamba.source import FileSource, SelectedSource

VOLUME = "volume="


def is_volume(path: Path) -> bool:
    """Whether a path is the address of one volume."""
    return path.name.startswith(VOLUME) and path.name.removeprefix(VOLUME).isdigit()


def volumes(path: Path, count: int) -> tuple[Path, ...]:
    """The addresses of the first `count` volumes of a file."""
    return tuple(path / f"{VOLUME}{number}" for number in range(count))


class VolumeSource(SelectedSource):
    """Volume `number` of a file's source; `path` is its address. Raises InputError("wrong_channels") for one that the
    file has not."""

    def __init__(self, path: Path, whole: FileSource) -> None:
        number, present = int(path.name.removeprefix(VOLUME)), len(whole.channels)
        if number >= present:
            raise InputError("wrong_channels", f"{whole.path}: has {present} volumes, number {number} is asked for")
        super().__init__(whole, number)
        self.path, self.notes, self._whole = path, whole.notes, whole

    def close(self) -> None:
        """Closes the file."""
        self._whole.close()
