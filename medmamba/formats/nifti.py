"""NIfTI-1/2 in and out. nibabel's x, y, z is turned to (z, y, x) here and nowhere else.

A `.nii` is read by window from the memory map; a `.nii.gz` has no random access, so one forward pass brings it into a
scratch file (its check sum verified on the way). Labels go out under the input's own header, bit for bit.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError

from medmamba.errors import GeometryError, InputError
from medmamba.files import atomic_write
from medmamba.grid import RAS, Grid
from medmamba.sample import Image
from medmamba.windows import Window

SUFFIXES = (".nii", ".nii.gz")
GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
PIECE = 1 << 18


def find(folder: Path) -> list[Path]:
    """NIfTI files below a folder, sorted; directory links are not followed."""
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())


class NiftiSource:
    """A NIfTI file as a Source: (C, z, y, x), C the 4th file axis (1 for 3D), RAS+ mm, slope and intercept applied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        image = open_nifti(path)
        self.header, self._proxy = image.header, proxy(image)
        shape = self.header.get_data_shape()
        spatial = (*shape, 1, 1)[:3] if len(shape) < 3 else shape[:3]
        extra = [n for n in shape[3:] if n != 1]
        if len(extra) > 1:
            raise InputError("wrong_channels", f"{path}: {len(shape)} dimensions {shape}; expected 3 or 4")
        volumes = extra[0] if extra else 1
        self.grid = _grid(path, self.header, spatial)
        self.channels = tuple(f"{i}" for i in range(volumes))
        self._slope, self._inter = float(self._proxy.slope), float(self._proxy.inter)
        self._scaled = (self._slope, self._inter) != (1.0, 0.0)
        stored = self.header.get_data_dtype()
        if stored.kind not in "iuf":
            raise InputError("unsupported_format", f"{path}: voxels of type {stored}; expected integers or floats")
        self.dtype = np.dtype("float32") if self._scaled else stored.newbyteorder("=")
        self._shape = (volumes, *spatial[::-1])
        self._stored = stored
        self._array: np.ndarray | None = None

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        if self._array is None:
            self._array = self._map()
        values = np.array(self._array[(slice(None), *window.slices)])
        if self._scaled:
            values = (values.astype(np.float64) * self._slope + self._inter).astype(np.float32)
        values = values.astype(self.dtype, copy=False)
        return Image(values, self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the memory map and its scratch file go."""
        self._array = None

    def _map(self) -> np.ndarray:
        data, offset = Path(self._proxy.file_like), int(self._proxy.offset)
        if not _is_gzip(data):
            return _memmap(data, self._stored, offset, self._shape)
        expected = offset + int(np.prod(self._shape)) * self._stored.itemsize
        with tempfile.TemporaryFile() as scratch:  # has no name: gone with the process, however that ends
            _unpack(data, scratch, expected)
            scratch.flush()
            return np.memmap(scratch, dtype=self._stored, mode="r", offset=offset, shape=self._shape)


def open_nifti(path: Path) -> nib.Nifti1Pair:
    """A NIfTI-1/2 file with its header, no voxel read; checked against its size. Raises InputError with a code."""
    if not path.exists():
        raise InputError("missing_file", f"{path}: no such file; correct the manifest or bring it back")
    if not os.access(path, os.R_OK):
        raise InputError("permission", f"{path}: may not be read; give this user read permission")
    if path.stat().st_size == 0:
        raise InputError("corrupt_file", f"{path}: 0 bytes; copy it again")
    if path.name.lower().endswith(".gz") and not _is_gzip(path):
        raise InputError("corrupt_file", f"{path}: is named .gz but is not gzip; rename or copy it again")
    try:
        image = nib.load(path)
    except FileNotFoundError as error:
        raise InputError(
            "missing_file", f"{path}: its data file is missing ({error.filename}); bring the pair back"
        ) from None
    except (ImageFileError, HeaderDataError, EOFError, OSError, zlib.error, ValueError) as error:
        raise InputError("corrupt_file", f"{path}: not readable as NIfTI ({_line(error)}); copy it again") from None
    if not isinstance(image, nib.Nifti1Image | nib.Nifti1Pair):
        raise InputError("unsupported_format", f"{path}: a {type(image).__name__}; expected NIfTI (.nii, .nii.gz)")
    shape = image.header.get_data_shape()
    if not shape or min(shape) < 1:
        raise InputError("bad_header", f"{path}: dimensions {shape}; every one must be at least 1")
    _check_size(path, image)
    return image


def proxy(image: nib.Nifti1Pair) -> ArrayProxy:
    """Where the voxels lie: file, offset, slope and intercept (the loaded header has them reset)."""
    found = image.dataobj
    assert isinstance(found, ArrayProxy)
    return found


def write_labels(path: Path, labels: np.ndarray, like: NiftiSource, *, names: Mapping[int, str] | None = None) -> None:
    """Labels (z, y, x) under the geometry of `like`; re-read and compared before the file gets its name.

    Affines, sform/qform codes and units equal those of the input bit for bit; label names go in a header extension
    (JSON). `.nii.gz` when `path` says so, the same bytes for the same labels.
    """
    if labels.shape != like.grid.shape:
        raise GeometryError(f"{path}: labels of shape {labels.shape}, the input has {like.grid.shape}")
    header = _label_header(like.header, labels, names)
    with atomic_write(path) as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="", compresslevel=6) as packed:
                _write_volume(packed, header, labels)  # type: ignore[arg-type]
        else:
            _write_volume(file, header, labels)
        file.flush()
        _compare(Path(file.name), path, labels, header, like.header)


def read_labels(path: Path) -> tuple[np.ndarray, Grid]:
    """A whole label volume (z, y, x) and its grid. Raises InputError when values are not whole numbers."""
    source = NiftiSource(path)
    image = source.read(Window.whole(source.grid.shape)).array[0]
    whole = np.rint(image)
    if not np.array_equal(whole, image):
        raise InputError("bad_header", f"{path}: label values such as {image[whole != image][0]} are not whole numbers")
    return whole.astype(np.int32), source.grid


def label_names(path: Path) -> dict[int, str]:
    """Names stored by `write_labels`, empty when there are none."""
    for extension in nib.load(path).header.extensions:  # type: ignore[attr-defined]
        if extension.get_code() == 6:
            try:
                values = json.loads(bytes(extension.get_content()).rstrip(b"\0").decode())
            except (ValueError, AttributeError):
                continue
            return {int(k): str(v) for k, v in values.get("labels", {}).items()}
    return {}


def _label_header(source: nib.Nifti1Header, labels: np.ndarray, names: Mapping[int, str] | None) -> nib.Nifti1Header:
    header = source.as_byteswapped("<") if source.endianness != "<" else source.copy()
    header.set_data_shape(labels.shape[::-1])
    largest = int(labels.max(initial=0))
    header.set_data_dtype(np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    header["cal_max"], header["cal_min"] = 0, 0
    header["intent_code"] = 1002  # NIFTI_INTENT_LABEL
    header["magic"] = header.single_magic
    header.extensions.clear()
    if names:
        text = json.dumps({"labels": {str(k): v for k, v in names.items()}}, ensure_ascii=True, sort_keys=True)
        header.extensions.append(Nifti1Extension(6, text.encode()))
    header["vox_offset"] = header.single_vox_offset + sum(e.get_sizeondisk() for e in header.extensions)
    return header


def _write_volume(file: BinaryIO, header: nib.Nifti1Header, labels: np.ndarray) -> None:
    header.write_to(file)
    if not header.extensions:
        file.write(b"\0" * (int(header["vox_offset"]) - len(header.binaryblock)))
    dtype = header.get_data_dtype()
    for plane in labels:
        file.write(np.ascontiguousarray(plane, dtype=dtype).tobytes())


def _compare(written: Path, path: Path, labels: np.ndarray, header: nib.Nifti1Header, source: nib.Nifti1Header) -> None:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(written, "rb") as file:
        again = type(header).from_fileobj(file)
        data = file.read()
    for name in GEOMETRY_FIELDS:
        if np.asarray(again[name]).tobytes() != np.asarray(source[name]).astype(again[name].dtype).tobytes():
            raise InputError(
                "output_mismatch", f"{path}: header field {name} is {again[name]}, the input has {source[name]}"
            )
    if again["pixdim"][:4].tobytes() != source["pixdim"][:4].astype(again["pixdim"].dtype).tobytes():
        raise InputError(
            "output_mismatch", f"{path}: pixdim {again['pixdim'][:4]} differs from the input {source['pixdim'][:4]}"
        )
    voxels = np.frombuffer(data[-labels.size * header.get_data_dtype().itemsize :], dtype=header.get_data_dtype())
    if not np.array_equal(voxels.reshape(labels.shape), labels):
        raise InputError("output_mismatch", f"{path}: labels read back differ from those written; check the disk")


def _grid(path: Path, header: nib.Nifti1Header, spatial: tuple[int, ...]) -> Grid:
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)[:, [2, 1, 0, 3]]
    try:
        grid = Grid(tuple(spatial[::-1]), affine, RAS)
    except GeometryError as error:
        raise InputError("bad_geometry", f"{path}: {error}; repair the header") from None
    if min(grid.spacing) <= 0 or min(grid.spacing) < 1e-6 * max(grid.spacing):
        raise InputError("bad_geometry", f"{path}: spacing {grid.spacing} mm; repair the header")
    return grid


def _check_size(path: Path, image: nib.Nifti1Pair) -> None:
    """The data file must hold what the header claims; a compressed one at least a 1032nd of it (deflate's limit)."""
    data = Path(proxy(image).file_like)
    if not data.exists():
        raise InputError("missing_file", f"{path}: its data file {data.name} is missing; bring the pair back")
    header = image.header
    voxels = int(np.prod(header.get_data_shape(), dtype=object))
    claimed = int(proxy(image).offset) + voxels * header.get_data_dtype().itemsize
    present = data.stat().st_size * (1032 if _is_gzip(data) else 1)
    if present < claimed:
        raise InputError(
            "corrupt_file", f"{path}: the header claims {claimed} bytes, the file can hold {present}; copy it again"
        )


def _memmap(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (ValueError, OSError) as error:
        raise InputError(
            "corrupt_file", f"{path}: fewer voxels than the header claims ({_line(error)}); copy it again"
        ) from None


def _unpack(path: Path, scratch: Any, expected: int) -> None:
    """Decompresses into `scratch`; reads to the end so that the check sum is verified, writes no more than expected."""
    written = 0
    try:
        with gzip.open(path, "rb") as packed:
            while piece := packed.read(PIECE):
                scratch.write(piece[: max(0, expected - written)])
                written += len(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            "corrupt_file", f"{path}: damaged gzip after {written} bytes ({_line(error)}); copy it again"
        ) from None
    if written < expected:
        raise InputError(
            "corrupt_file", f"{path}: {written} bytes unpacked, the header claims {expected}; copy it again"
        )


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
