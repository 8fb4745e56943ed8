"""What the headers of a series say, file by file, before a voxel is read; and the decoding of single frames."""

from __future__ import annotations

import errno
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import IO, Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.pixels import iter_pixels
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from medmamba.errors import InputError
from medmamba.formats.dicom_files import Member
from medmamba.formats.dicom_pixels import measure, require_decoder, require_grey

STACKED = {  # storage classes whose images are slices of a volume
    *(f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130")),
}
OVERLAID = {  # grids of their own that are laid over an image: segmentations, parametric maps, dose
    *(f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("30", "66.4", "66.7", "481.2")),
}
FAULTS = (
    *(InvalidDicomError, ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, OSError, struct.error),
    *(NotImplementedError, OverflowError, RuntimeError, zlib.error, zipfile.BadZipFile),
)
TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "InstanceNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel", "NumberOfFrames"),
    *("FrameOfReferenceUID", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "Units"),
    *("ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
PIXELS = {Tag(t) for t in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")}
MOST_META, MOST_ELEMENTS = 100, 50_000  # of one file; more is noise that would be read for hours
INSTANCE, TIME = 40, 20  # where the file's and the time's number stand in the number of a frame


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One slice: where it lies (LPS mm) and how its stored numbers become values (stored * slope + intercept)."""

    member: Member
    index: int
    instance: str
    number: int | None
    shape: tuple[int, int]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None
    slope: float
    intercept: float
    bits: tuple[int, int, bool]
    localizer: bool
    units: str
    space: str


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what a damaged file makes the reader raise into InputError("corrupt_file"); silences its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except FAULTS as error:
            if isinstance(error, PermissionError):
                raise InputError("permission", f"{name}: may not be read; give this user read permission") from None
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # the disk's or the network's fault, which may pass
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError("corrupt_file", f"{name}: not readable as DICOM ({line}); copy it again") from None


def series_of(member: Member) -> str | None:
    """The SeriesInstanceUID of a file that holds slices of a volume; None for any other DICOM object."""
    wanted = [Tag(t) for t in ("SOPClassUID", "SeriesInstanceUID", "ImagePositionPatient", "Rows")]
    with reading(member.name), member.open() as file:
        _check_start(member.name, file)
        head = read_partial(file, until(lambda tag: tag > Tag("Rows")), specific_tags=wanted)  # type: ignore[arg-type]
        kind = _kind(head)
        if not kind or (kind in STACKED and ("Rows" not in head or "SeriesInstanceUID" not in head)):
            raise EOFError("ends before it says what it holds")
        return str(head.get("SeriesInstanceUID", "")) if is_slice(head) else None


def until(reached: Callable[[BaseTag], bool]) -> Callable[[BaseTag, str | None, int], bool]:
    """When to stop reading a header: at a tag, or with ValueError after more elements than any header has."""
    seen = count()

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        if next(seen) > MOST_ELEMENTS:
            raise ValueError(f"more than {MOST_ELEMENTS} elements")
        return reached(tag)

    return stop


def is_slice(head: Dataset) -> bool:
    """Whether a header is one of slices: pixels, and a class of slices or a position in space."""
    kind = _kind(head)
    return "Rows" in head and kind not in OVERLAID and (kind in STACKED or "ImagePositionPatient" in head)


def _kind(head: Dataset) -> str:
    """The storage class, also of a file cut before it."""
    return str(head.get("SOPClassUID") or head.file_meta.get("MediaStorageSOPClassUID", ""))


def read_header(member: Member) -> Dataset:
    """The header of one file, without pixels and without what we do not use; its pixel data measured.

    Raises InputError: corrupt_file, unsupported_format (naming what it is), too_large.
    """
    name = member.name
    with reading(name), member.open() as file:
        _check_start(name, file)
        wanted = [Tag(t) for t in TAGS]
        head = read_partial(file, until(PIXELS.__contains__), specific_tags=wanted)  # type: ignore[arg-type]
        if not is_slice(head):
            kind = UID(_kind(head)).name
            if not kind or ("Rows" not in head and _kind(head) in STACKED):
                raise EOFError("ends before it says what it holds")
            raise InputError("unsupported_format", f"{name}: {kind}; expected slices of a volume (CT, MR, PET, ...)")
        require_decoder(name, head)
        require_grey(name, head)
        measure(member, file, head)
    return head


def frames_of(member: Member, head: Dataset) -> list[Frame]:
    """Every frame of a file. Raises InputError("bad_geometry") when it does not say where it lies."""
    with reading(member.name):
        number = int(head.get("NumberOfFrames") or 1)
        shared = next(iter(head.get("SharedFunctionalGroupsSequence") or ()), Dataset())
        single = list(head.get("PerFrameFunctionalGroupsSequence") or ())
        if single and len(single) != number:
            raise InputError("bad_header", f"{member.name}: {number} frames, positions of {len(single)}; copy it again")
        if number > 1 and not single:
            raise InputError("bad_geometry", f"{member.name}: {number} frames without positions; convert it to slices")
        return [_frame(member, head, i, (single[i] if single else Dataset(), shared)) for i in range(number)]


def decode(frames: Iterable[Frame]) -> Iterator[tuple[Frame, np.ndarray]]:
    """Stored numbers (rows, columns) of frames of one file in its own order, sign and unused bits put right."""
    wanted = sorted(frames, key=lambda f: f.index)
    member = wanted[0].member
    with reading(member.name), member.open() as file:
        arrays = iter_pixels(file, indices=[f.index for f in wanted], raw=True)  # type: ignore[arg-type]
        for frame, array in zip(wanted, arrays, strict=True):
            if array.shape != frame.shape:
                raise InputError(
                    "corrupt_file", f"{member.name}: pixels {array.shape}, header {frame.shape}; copy it again"
                )
            yield frame, _whole_bits(array, *frame.bits)


def _whole_bits(array: np.ndarray, allocated: int, stored: int, signed: bool) -> np.ndarray:
    """Numbers of `stored` bits in cells of `allocated`: what stands above them (overlays, padding) is cut off."""
    spare = array.dtype.itemsize * 8 - stored
    if spare <= 0 or array.dtype.itemsize * 8 != allocated:
        return array
    kind = np.dtype(f"{'i' if signed else 'u'}{array.dtype.itemsize}")
    return (array.view(kind) << spare) >> spare


def _frame(member: Member, head: Dataset, index: int, groups: tuple[Dataset, Dataset]) -> Frame:
    def value(sequence: str, keyword: str) -> Any:
        for group in groups:
            if sequence in group and group[sequence].value and keyword in group[sequence][0]:
                return group[sequence][0].get(keyword)
        return head.get(keyword)

    name = member.name
    place = value("PlanePositionSequence", "ImagePositionPatient")
    turn = value("PlaneOrientationSequence", "ImageOrientationPatient")
    pixel = value("PixelMeasuresSequence", "PixelSpacing")
    if place is None or turn is None or pixel is None or (len(place), len(turn), len(pixel)) != (3, 6, 2):
        raise InputError("bad_geometry", f"{name}: frame {index + 1} says no position, orientation or pixel spacing")
    thick = value("PixelMeasuresSequence", "SpacingBetweenSlices") or value("PixelMeasuresSequence", "SliceThickness")
    slope = value("PixelValueTransformationSequence", "RescaleSlope")
    intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
    temporal = value("FrameContentSequence", "TemporalPositionIndex")
    number = head.get("InstanceNumber")
    if number is not None:  # in order of file, then time, then place in the file
        number = (int(number) << INSTANCE) + (int(temporal or 0) << TIME) + index
    numbers = (*map(float, place), *map(float, turn), *map(float, pixel))
    if not np.isfinite(numbers).all():
        raise InputError("bad_geometry", f"{name}: position {place}, orientation {turn}, pixel spacing {pixel}")
    return Frame(
        member=member,
        index=index,
        instance=str(head.get("SOPInstanceUID", name)),
        number=None if number is None else int(number),
        shape=(int(head.Rows), int(head.Columns)),
        position=numbers[:3],
        orientation=numbers[3:9],
        spacing=numbers[9:],
        thickness=float(thick) if thick else None,
        slope=float(1 if slope is None else slope),
        intercept=float(0 if intercept is None else intercept),
        bits=(int(head.BitsAllocated), int(head.BitsStored), bool(head.PixelRepresentation)),
        localizer="LOCALIZER" in [str(word).upper() for word in head.get("ImageType") or ()],
        units=str(head.get("Units", "")),
        space=str(head.get("FrameOfReferenceUID", "")),
    )


def _check_start(name: str, file: IO[bytes]) -> None:
    """The mark and the file's own group of elements, before a parser may follow them wherever they lead.

    A deflated file is refused: it is unpacked whole, whatever it grows to, before its header can be read.
    """
    if file.read(132)[128:] != b"DICM":
        raise ValueError("no DICM mark at byte 128")
    for _ in range(MOST_META):
        group, element, kind, length = struct.unpack("<HH2sH", file.read(8))
        if group != 2:
            break
        if kind in (b"OB", b"UN"):
            (length,) = struct.unpack("<I", file.read(4))
        value = file.read(min(length, 64))
        file.seek(length - len(value), 1)
        if element == 0x10 and value.rstrip(b"\0 ") == DeflatedExplicitVRLittleEndian.encode():
            raise InputError("unsupported_format", f"{name}: a deflated file; unpack it with a DICOM tool first")
    if group <= 2:
        raise ValueError(f"element of group {group} where the image's own begin")
    file.seek(0)
