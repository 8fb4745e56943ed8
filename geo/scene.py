"""What geo adds to a Source: units and notes; and a scene whose bands lie in several files as one source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medmamba.sample import Image
from medmamba.source import Source, StackedSource
from medmamba.windows import Window


class Scene(Source, Protocol):
    """A source of geo: values in `units`, `notes` for the report, `close` lets its files go."""

    @property
    def units(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def close(self) -> None: ...


class BandsSource:
    """`parts` on one grid, channels one after another, valid where all are. Raises GeometryError on other grids."""

    def __init__(self, path: Path, parts: Sequence[Scene], *, units: str, notes: tuple[str, ...] = ()) -> None:
        self.path, self.parts, self.units, self.notes = path, tuple(parts), units, notes
        self._stacked = StackedSource(*self.parts)
        self.grid, self.channels, self.dtype = self._stacked.grid, self._stacked.channels, self._stacked.dtype

    def read(self, window: Window) -> Image:
        return self._stacked.read(window)

    def close(self) -> None:
        """Lets the files go."""
        for part in self.parts:
            part.close()
