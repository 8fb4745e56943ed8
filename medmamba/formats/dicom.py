"""DICOM series in: a folder, a zip or a multi-frame file as one volume, strictly by position.

Nothing is guessed: a missing or doubled slice, mixed orientations or series, a localizer among the slices and a file
cut short are refused, each under its own code (`medmamba.errors`); a tilted gantry is kept as a sheared grid and told.
Headers are read at once, slices decoded when a window wants them, each once.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from medmamba.errors import GeometryError, InputError
from medmamba.formats.dicom_files import SERIES, SUFFIXES, ZIP, Member, address, knows, members, own_members
from medmamba.formats.dicom_frames import INSTANCE, Frame, decode, frames_of, read_header, series_of
from medmamba.formats.dicom_stack import stack
from medmamba.grid import RAS, Grid
from medmamba.sample import Image
from medmamba.windows import Window

__all__ = ["SUFFIXES", "ZIP", "DicomSource", "images", "knows", "parts"]


def images(path: Path) -> tuple[Path, ...]:
    """The addresses of the volumes in a folder itself or in a zip: itself when it is one, else one a series.

    DICOM objects that are no slices (plans, reports, segmentations) are passed over. A file that cannot be read
    belongs to the only series beside it, else it stands for itself. Raises OSError.
    """
    try:
        series, unreadable = _sorted_by_series(own_members(path) if path.is_dir() else members(path))
    except InputError:
        return (path,)  # opening it says why
    if len(series) < 2:
        return (path,) if series or unreadable else ()
    lone = [m.path for m in unreadable if m.path is not None]
    if len(lone) < len(unreadable):
        return (path,)
    return (*(path / f"{SERIES}{uid}" for uid in sorted(series)), *lone)


def parts(path: Path) -> tuple[Path, ...]:
    """The files that hold the series at an address, sorted; a zip is one file. Raises OSError."""
    place, uid = address(path)
    if not place.is_dir():
        return (place,)
    found = members(place)
    if uid is not None:
        found = _sorted_by_series(found)[0].get(uid, [])
    return tuple(m.path for m in found if m.path is not None) or (path,)


class DicomSource:
    """A series as a Source: (V, z, y, x) in RAS+ mm, slope and intercept applied; V volumes of a time series, else 1.

    z rises along the normal of the slices. `units` as PET says them ("BQML"). Raises InputError naming file and code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        frames, passed = _frames(path)
        first = frames[0]
        found = stack(
            str(path),
            np.array([f.position for f in frames]),
            np.array([f.orientation for f in frames]),
            first.spacing,
            thickness=first.thickness,
            numbers=[f.number for f in frames],
        )
        self.frames = tuple(tuple(frames[i] for i in volume) for volume in found.order)
        shape = (found.order.shape[1], *first.shape)
        try:
            self.grid = Grid(shape, found.affine, RAS)
        except GeometryError as error:
            raise InputError("bad_geometry", f"{path}: {error}; repair the headers") from None
        self.channels = tuple(f"{i}" for i in range(len(self.frames)))
        self.dtype = _dtype(frames)
        self.units = first.units
        self.notes = (*found.notes, *_told(frames, passed))
        self._values: np.ndarray | None = None
        self._present = np.zeros((len(self.frames), shape[0]), dtype=bool)

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        if self._values is None:
            self._values = self._scratch()
        self._bring(window)
        values = np.array(self._values[(slice(None), *window.slices)])
        return Image(values, self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the scratch file go; what was decoded is decoded again when asked for."""
        self._values = None
        self._present[:] = False

    def _scratch(self) -> np.ndarray:
        """Room on disk for the decoded slices, in a file without a name: gone with the process, however that ends."""
        shape = (len(self.frames), *self.grid.shape)
        size = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        with tempfile.TemporaryFile() as scratch:
            os.posix_fallocate(scratch.fileno(), 0, size)  # a full disk is an error now, not a crash later
            return np.memmap(scratch, dtype=self.dtype, mode="r+", shape=shape)

    def _bring(self, window: Window) -> None:
        """Decodes the slices of a window that are not there yet, file by file."""
        assert self._values is not None
        wanted: dict[Member, dict[Frame, tuple[int, int]]] = defaultdict(dict)
        for z in range(window.start[0], window.stop[0]):
            for v in range(len(self.frames)):
                if not self._present[v, z]:
                    frame = self.frames[v][z]
                    wanted[frame.member][frame] = (v, z)
        for places in wanted.values():
            for frame, stored in decode(places):
                self._values[places[frame]] = _scaled(stored, frame, self.dtype)
                self._present[places[frame]] = True


def _frames(path: Path) -> tuple[list[Frame], Counter[str]]:
    """All frames at an address, and why files beside them were passed over. Raises InputError."""
    place, uid = address(path)
    if not place.exists():
        raise InputError("missing_file", f"{place}: no such file or folder; correct the manifest or bring it back")
    try:
        found = members(place)
    except PermissionError:
        raise InputError("permission", f"{place}: may not be read; give this user read permission") from None
    passed: Counter[str] = Counter()
    if len(found) > 1 or uid is not None:
        found, passed = _one_series(path, found, uid)
    if not found:
        raise InputError("unsupported_format", f"{path}: no DICOM slices there; expected a series of CT, MR or PET")
    frames = [frame for member in found for frame in frames_of(member, read_header(member))]
    _require_one_kind(path, frames)
    return frames, passed


def _one_series(path: Path, found: list[Member], uid: str | None) -> tuple[list[Member], Counter[str]]:
    """The members of the series `uid`, or of the only one. Unreadable files stay: reading them says why."""
    series, unreadable = _sorted_by_series(found)
    if uid is None and len(series) > 1:
        names = ", ".join(f"{n} ({len(m)} files)" for n, m in sorted(series.items())[:5])
        raise InputError(
            "mixed_series", f"{path}: {len(series)} series in one place: {names}; name one as {path.name}/{SERIES}UID"
        )
    wanted = series.get(uid, []) if uid is not None else [m for s in (*series.values(), unreadable) for m in s]
    others = len(found) - sum(map(len, series.values())) - len(unreadable)
    return wanted, Counter({"DICOM objects that are no slices": others} if others else {})


def _sorted_by_series(found: list[Member]) -> tuple[dict[str, list[Member]], list[Member]]:
    """Slices by SeriesInstanceUID, and the files that cannot be read."""
    series: dict[str, list[Member]] = defaultdict(list)
    unreadable = []
    for member in found:
        try:
            uid = series_of(member)
        except InputError:
            unreadable.append(member)
            continue
        if uid is not None:
            series[uid].append(member)
    return series, unreadable


def _require_one_kind(path: Path, frames: list[Frame]) -> None:
    """Slices of one series must be of one size, none twice, none a localizer among others."""
    first = frames[0]
    scouts = sum(f.localizer for f in frames)
    turned = any(np.abs(np.subtract(f.orientation, first.orientation)).max() > 1e-3 for f in frames)
    if 0 < scouts < len(frames):
        raise InputError("localizer", f"{path}: {scouts} of {len(frames)} slices are localizers; remove them")
    for frame in frames:
        off = np.abs(np.subtract(frame.spacing, first.spacing)).max() > 1e-3 * min(first.spacing)
        if not turned and (frame.shape != first.shape or off):
            raise InputError(
                "mixed_series",
                f"{frame.member.name}: {frame.shape} pixels of {frame.spacing} mm, the first slice has {first.shape} "
                f"of {first.spacing}; split the series",
            )
    for what in ("units", "space"):
        found = sorted({str(getattr(f, what)) for f in frames})
        if len(found) > 1:
            raise InputError("mixed_series", f"{path}: slices of several {what}: {found[:3]}; split the series")
    (instance, index), copies = Counter((f.instance, f.index) for f in frames).most_common(1)[0]
    if copies > 1:
        twice = [f.member.name for f in frames if (f.instance, f.index) == (instance, index)]
        raise InputError(
            "duplicate_slice", f"{path}: {twice[0]} and {twice[1]} are one and the same slice; remove the copies"
        )


def _told(frames: list[Frame], passed: Counter[str]) -> tuple[str, ...]:
    notes = [f"{n} {what} beside the series passed over" for what, n in passed.items()]
    if frames[0].units:
        notes.append(f"values in {frames[0].units} as the PET header says; no SUV is computed")
    if all(f.localizer for f in frames):
        notes.append("the series is a localizer (scout)")
    numbers = sorted({f.number >> INSTANCE for f in frames if f.number is not None})
    if len(numbers) == len(frames) > 1 and (numbers[0] > 1 or numbers[-1] - numbers[0] >= len(frames)):
        notes.append(
            f"instance numbers run from {numbers[0]} to {numbers[-1]} over {len(frames)} evenly spaced slices; "
            "look whether the series is whole"
        )
    return tuple(notes)


def _scaled(stored: np.ndarray, frame: Frame, dtype: np.dtype) -> np.ndarray:
    if (frame.slope, frame.intercept) == (1.0, 0.0):
        return stored.astype(dtype, copy=False)
    return (stored.astype(np.float64) * frame.slope + frame.intercept).astype(dtype)


def _dtype(frames: list[Frame]) -> np.dtype:
    """The smallest integers that hold every value the headers allow; float32 when values are scaled by a fraction."""
    lowest, highest = 0.0, 0.0
    for frame in frames:
        if frame.slope != 1 or not float(frame.intercept).is_integer():
            return np.dtype("float32")
        _, stored, signed = frame.bits
        lowest = min(lowest, (-(2 ** (stored - 1)) if signed else 0) + frame.intercept)
        highest = max(highest, (2 ** (stored - 1) if signed else 2**stored) - 1 + frame.intercept)
    for name in ("uint8", "int16", "uint16", "int32"):
        if np.iinfo(name).min <= lowest and highest <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype("float32")
