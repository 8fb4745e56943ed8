"""Whether the pixel data of a DICOM file is what its header claims, before memory is taken."""

from __future__ import annotations

import struct
from typing import IO

from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID, RLELossless

from medmamba.errors import InputError
from medmamba.formats.dicom_files import Member

LARGEST_FRAME = 2**31  # bytes of one decoded frame
RLE_LIMIT = 64  # two bytes of run lengths stand for 128 at most
SLACK = 2**24  # bytes that compressed pixel data may have beyond twice the raw ones
JPEG_SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # start of frame: the marker that holds rows and columns


def require_decoder(name: str, head: Dataset) -> None:
    """Raises InputError("unsupported_format") when no installed decoder knows how the pixels are stored."""
    syntax = UID(str(head.file_meta.get("TransferSyntaxUID", "")))
    try:
        known = get_decoder(syntax).is_available
    except NotImplementedError:
        known = False
    if not known:
        said = syntax.name or "no transfer syntax"
        raise InputError(
            "unsupported_format", f"{name}: pixels stored as {said}; decompress it with a DICOM tool first"
        )


def require_grey(name: str, head: Dataset) -> None:
    """Raises InputError unless there is one whole number a pixel, turned into a value by slope and intercept."""
    colour = str(head.get("PhotometricInterpretation", "MONOCHROME2"))
    if int(head.get("SamplesPerPixel") or 1) != 1 or not colour.startswith("MONOCHROME"):
        raise InputError("unsupported_format", f"{name}: colours ({colour}); expected one grey value a pixel")
    if head.get("ModalityLUTSequence"):
        raise InputError("unsupported_format", f"{name}: values by a look-up table; expected slope and intercept")
    if int(head.BitsAllocated) not in (8, 16, 32) or not 0 < int(head.BitsStored) <= int(head.BitsAllocated):
        raise InputError(
            "bad_header", f"{name}: {head.BitsStored} of {head.BitsAllocated} bits; expected 8, 16 or 32 allocated"
        )
    if int(head.Rows) < 1 or int(head.Columns) < 1 or int(head.get("NumberOfFrames") or 1) < 1:
        raise InputError("bad_header", f"{name}: {head.Rows} x {head.Columns} pixels; every number must be at least 1")


def measure(member: Member, file: IO[bytes], head: Dataset) -> None:
    """Compares the pixel data, at whose element `file` stands, with what the header claims.

    Raises InputError: corrupt_file (cut short), bad_header (two sizes), too_large, unsupported_format.
    """
    name, raw = member.name, int(head.Rows) * int(head.Columns) * int(head.BitsAllocated) // 8
    count = int(head.get("NumberOfFrames") or 1)
    if raw > LARGEST_FRAME:
        raise InputError("too_large", f"{name}: the header claims {raw >> 20} MiB in one frame")
    order = "<" if head.original_encoding[1] else ">"
    tag = struct.unpack(f"{order}HH", _take(name, file, 4))
    if tag != (0x7FE0, 0x0010):
        raise InputError("unsupported_format", f"{name}: element {tag} instead of integer pixel data")
    (length,) = struct.unpack(f"{order}I", _take(name, file, 4 if head.original_encoding[0] else 8)[-4:])
    left = member.size - file.tell()
    if length != 0xFFFFFFFF:
        if min(length, left) < raw * count:
            raise InputError(
                "corrupt_file",
                f"{name}: {min(length, left)} bytes of pixels, the header claims {raw * count}; copy it again",
            )
        return
    run_lengths = head.file_meta.TransferSyntaxUID == RLELossless
    if left > 2 * raw * count + SLACK or (run_lengths and raw * count > RLE_LIMIT * left):
        raise InputError("corrupt_file", f"{name}: {left} compressed bytes for {raw * count} raw ones; copy it again")
    _measure_fragments(member, file, head, count)


def _measure_fragments(member: Member, file: IO[bytes], head: Dataset, count: int) -> None:
    """Compressed pixel data: whole, at least a fragment a frame, and of the size that the header claims."""
    name, fragments = member.name, -1  # the first item is a table of offsets
    while True:
        group, element, length = struct.unpack("<HHI", _take(name, file, 8))
        if (group, element) == (0xFFFE, 0xE0DD):
            break
        if (group, element) != (0xFFFE, 0xE000) or file.tell() + length > member.size:
            raise InputError("corrupt_file", f"{name}: compressed pixels end early; copy it again")
        start = file.read(min(length, 4096))
        shape = codestream_shape(start) if fragments >= 0 else None
        if shape is not None and shape != (int(head.Rows), int(head.Columns)):
            raise InputError(
                "bad_header", f"{name}: pixels {shape}, header {(head.Rows, head.Columns)}; they must be equal"
            )
        file.seek(length - len(start), 1)
        fragments += 1
    if fragments < count:
        raise InputError("corrupt_file", f"{name}: {max(0, fragments)} compressed frames of {count}; copy it again")


def _take(name: str, file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise InputError("corrupt_file", f"{name}: ends before its pixel data does; copy it again")
    return data


def codestream_shape(data: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream claims in its first bytes; None when not told there."""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 24:  # JPEG 2000: SIZ holds the far corner and the offset
        width, height, left, top = struct.unpack(">4I", data[8:24])
        return height - top, width - left
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in JPEG_SIZES:
            rows, columns = struct.unpack(">HH", data[at + 5 : at + 9])
            return rows, columns
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    return None
