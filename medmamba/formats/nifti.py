"""NIfTI-1/2 in and out. nibabel's x, y, z is turned to (z, y, x) here and nowhere else.

A `.nii` is read by window from the memory map; a `.nii.gz` has no random access, so one forward pass brings it into a
scratch file (its check sum verified on the way). Labels go out under the input's own header, bit for bit.
"""

from __future__ import annotations

import gzip
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.brikhead import AFNIImageError
from nibabel.nifti1 import Nifti1Extension
from nibabel.parrec import PARRECError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from medmamba.errors import GeometryError, InputError
from medmamba.files import atomic_write
from medmamba.formats.mapped import Mapped
from medmamba.formats.opening import file_grid, file_shape, one_line, require_file, require_size
from medmamba.grid import RAS, Grid
from medmamba.sample import Image
from medmamba.source import Source, whole_labels
from medmamba.windows import Window

SUFFIXES = (".nii", ".nii.gz")  # what we write; a pair (.hdr + .img) is read too
GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
INTENT_LABEL = 1002  # NIFTI_INTENT_LABEL: values are labels
UNITS = {"meter": 1000.0, "mm": 1.0, "micron": 1e-3}  # in mm; a file that names none is taken as mm


def find(folder: Path) -> list[Path]:
    """NIfTI files below a folder, sorted; directory links are not followed."""
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())


def parts(path: Path) -> tuple[Path, ...]:
    """The file itself, or both halves of a `.hdr` + `.img` pair, header first."""
    if path.suffix.lower() not in (".hdr", ".img"):
        return (path,)
    halves = (path.with_suffix(".hdr"), path.with_suffix(".img"))
    return halves if all(half.exists() for half in halves) else (path,)


class NiftiSource:
    """A NIfTI file as a Source: (C, z, y, x), C the 4th file axis (1 for 3D), RAS+ mm, slope and intercept applied."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        image = open_nifti(path)
        self.header = image.header
        spatial, volumes = file_shape(path, self.header.get_data_shape())
        self.grid = file_grid(path, spatial, self.header.get_best_affine(), mm=UNITS.get(_unit(self.header), 1.0))
        self.channels = tuple(f"{i}" for i in range(volumes))
        self._voxels = mapped(path, proxy(image), (volumes, *self.grid.shape))
        self.dtype = self._voxels.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        return Image(self._voxels.read(window), self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the memory map and its scratch file go."""
        self._voxels.close()


def open_nifti(path: Path) -> nib.Nifti1Pair:
    """A NIfTI-1/2 file with its header, no voxel read; checked against its size. Raises InputError with a code."""
    image = load(path)
    if not isinstance(image, nib.Nifti1Image | nib.Nifti1Pair):
        raise InputError("unsupported_format", f"{path}: a {type(image).__name__}; expected NIfTI (.nii, .nii.gz)")
    file_shape(path, image.header.get_data_shape())
    require_proxy_size(path, image)
    return image


def load(path: Path) -> nib.filebasedimages.FileBasedImage:
    """What nibabel makes of a file, no voxel read. Raises InputError with a code."""
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # nibabel leaves an MGH file open
            return nib.load(path)
    except FileNotFoundError as error:
        raise InputError(
            "missing_file", f"{path}: its data file is missing ({error.filename}); bring the pair back"
        ) from None
    except AFNIImageError as error:
        raise InputError("unsupported_format", f"{path}: {one_line(error)} Split it into one file a type") from None
    except (HeaderDataError, HeaderTypeError, PARRECError) as error:
        raise InputError("bad_header", f"{path}: {one_line(error)}; repair the header or export it again") from None
    except MemoryError:
        raise
    except Exception as error:  # what a parser raises on hostile bytes is no closed list
        raise InputError("corrupt_file", f"{path}: not readable ({one_line(error)}); copy it again") from None


def require_proxy_size(path: Path, image: nib.spatialimages.SpatialImage) -> None:
    """The data file must be able to hold what the header claims."""
    found = proxy(image)
    voxels = int(np.prod(found.shape, dtype=object))
    require_size(path, Path(found.file_like), int(found.offset) + voxels * found.dtype.itemsize)


def mapped(path: Path, found: ArrayProxy, shape: tuple[int, ...], slope: float | np.ndarray | None = None) -> Mapped:
    """The voxels that a nibabel proxy points to, as (C, z, y, x); `slope` in place of the proxy's own."""
    return Mapped(
        path=path,
        data=Path(found.file_like),
        stored=found.dtype,
        offset=int(found.offset),
        shape=shape,
        slope=float(found.slope) if slope is None else slope,
        inter=float(found.inter),
    )


def proxy(image: nib.spatialimages.SpatialImage) -> ArrayProxy:
    """Where the voxels lie: file, offset, slope and intercept (the loaded header has them reset)."""
    found = image.dataobj
    assert isinstance(found, ArrayProxy)
    return found


def write_labels(path: Path, labels: np.ndarray, like: Source, *, names: Mapping[int, str] | None = None) -> None:
    """Labels (z, y, x) under the geometry of `like`; re-read and compared before the file gets its name.

    Affines, sform/qform codes and units equal those of a NIfTI input bit for bit; for another format they hold its
    grid. Label names go in a header extension (JSON). `.nii.gz` when `path` says so, same bytes for the same labels.
    """
    _write(path, labels, like, names=names, intent=INTENT_LABEL)


def write_map(path: Path, values: np.ndarray, like: Source) -> None:
    """Whole numbers from 0 on (z, y, x) that are no labels, for example percent; else as `write_labels`."""
    _write(path, values, like, names=None, intent=0)


def _write(path: Path, labels: np.ndarray, like: Source, *, names: Mapping[int, str] | None, intent: int) -> None:
    if labels.shape != like.grid.shape:
        raise GeometryError(f"{path}: labels of shape {labels.shape}, the input has {like.grid.shape}")
    source = like.header if isinstance(like, NiftiSource) else header_of(like.grid)
    header = _label_header(source, labels, names)
    header["intent_code"] = intent
    with atomic_write(path) as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="", compresslevel=6) as packed:
                _write_volume(packed, header, labels)  # type: ignore[arg-type]
        else:
            _write_volume(file, header, labels)
        file.flush()
        _compare(Path(file.name), path, labels, header, source)


def label_bytes(labels: np.ndarray, grid: Grid) -> bytes:
    """A `.nii.gz` of labels (z, y, x) on a grid (RAS+ mm), for places that are no files."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="", compresslevel=6) as packed:
        _write_volume(packed, _label_header(header_of(grid), labels, None), labels)  # type: ignore[arg-type]
    return buffer.getvalue()


def header_of(grid: Grid) -> nib.Nifti1Header:
    """A header that says where a grid (RAS+ mm) lies: sform, and qform too when nothing is sheared."""
    if grid.rank != 3 or grid.frame != RAS:
        raise GeometryError(f"a NIfTI header holds a grid of rank 3 in {RAS}; got rank {grid.rank} in {grid.frame}")
    header = nib.Nifti1Header()
    header.set_data_shape(grid.shape[::-1])
    affine = grid.affine[:, [2, 1, 0, 3]]
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rigid = np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-5)
    header.set_qform(affine, code=1 if rigid else 0)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


def read_labels(path: Path) -> tuple[np.ndarray, Grid]:
    """A whole NIfTI label volume (z, y, x) and its grid. Raises InputError when values are not whole numbers."""
    source = NiftiSource(path)
    return whole_labels(source), source.grid


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
    header["intent_code"] = INTENT_LABEL
    header["magic"] = header.single_magic
    header.extensions.clear()
    if names:
        text = json.dumps({"labels": {str(k): v for k, v in names.items()}}, ensure_ascii=True, sort_keys=True)
        header.extensions.append(Nifti1Extension(6, text.encode()))
    header["vox_offset"] = header.single_vox_offset + sum(e.get_sizeondisk() for e in header.extensions)
    return header


def _write_volume(file: BinaryIO, header: nib.Nifti1Header, labels: np.ndarray) -> None:
    header.write_to(file)
    file.write(b"\0" * (int(header["vox_offset"]) - file.tell()))
    dtype = header.get_data_dtype()
    for plane in labels:
        file.write(np.ascontiguousarray(plane, dtype=dtype).tobytes())


def _compare(written: Path, path: Path, labels: np.ndarray, header: nib.Nifti1Header, source: nib.Nifti1Header) -> None:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(written, "rb") as file:
        again = type(header).from_fileobj(file)
        file.seek(int(header["vox_offset"]))
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
    voxels = np.frombuffer(data, dtype=header.get_data_dtype())
    if voxels.size != labels.size or not np.array_equal(voxels.reshape(labels.shape), labels):
        raise InputError("output_mismatch", f"{path}: labels read back differ from those written; check the disk")


def _unit(header: nib.Nifti1Header) -> str:
    """The unit of length, "unknown" for a code that nobody defined."""
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError:
        return "unknown"
