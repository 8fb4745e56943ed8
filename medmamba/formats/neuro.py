"""The formats of neuroimaging beside NIfTI, in: Analyze 7.5, FreeSurfer MGH/MGZ, AFNI, Philips PAR/REC, MINC-1.

nibabel reads the headers and gives the affine to RAS+; what it maps is read by window, the rest (PAR/REC, MINC-1) by
its own slicing. nibabel's axes x, y, z are turned to (z, y, x).
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.brikhead import AFNIImage
from nibabel.parrec import PARRECArrayProxy, PARRECImage

from medmamba.errors import InputError
from medmamba.formats import itk
from medmamba.formats.mapped import Mapped
from medmamba.formats.nifti import NiftiSource, load, mapped, require_proxy_size
from medmamba.formats.opening import file_grid, file_shape, one_line, require_file, require_size
from medmamba.sample import Image
from medmamba.source import FileSource
from medmamba.windows import Window

KINDS = (nib.AnalyzeImage, nib.MGHImage, AFNIImage, PARRECImage, nib.Minc1Image)
ANALYZE = "Analyze 7.5 does not say which side is left: voxels taken as stored from right to left (radiological)"
HDF5 = b"\x89HDF"


class NeuroSource:
    """A file of KINDS as a Source: (C, z, y, x), C the 4th file axis (1 for 3D), RAS+ mm, scaled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        image = load(path)
        if not isinstance(image, KINDS):
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise InputError("unsupported_format", f"{path}: a {type(image).__name__}; expected one of {known}")
        if isinstance(image, nib.Minc1Image) and len(image.shape) > 3:
            raise InputError("wrong_channels", f"{path}: MINC-1 of shape {image.shape}; split it into volumes first")
        spatial, volumes = file_shape(path, image.shape)
        self.grid = file_grid(path, spatial, image.affine)
        self.channels = tuple(f"{i}" for i in range(volumes))
        told = (
            "mat" in image.file_map and Path(str(image.file_map["mat"].filename)).exists()
        )  # SPM keeps the affine there
        self.notes = (ANALYZE,) if isinstance(image, nib.AnalyzeImage) and not told else ()
        self._voxels = _voxels(path, image, (volumes, *self.grid.shape))
        self.dtype = self._voxels.dtype

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        return Image(self._voxels.read(window), self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the memory map and its scratch file go."""
        self._voxels.close()


class Sliced:
    """Voxels that nibabel itself slices and scales, float32."""

    def __init__(self, path: Path, image: nib.spatialimages.SpatialImage) -> None:
        self.path, self._dataobj, self.dtype = path, image.dataobj, np.dtype("float32")

    def read(self, window: Window) -> np.ndarray:
        """(C, *window.size)."""
        try:
            values = np.asarray(self._dataobj[window.slices[::-1]], dtype=self.dtype)
        except (OSError, ValueError, EOFError) as error:
            raise InputError("corrupt_file", f"{self.path}: voxels cannot be read ({one_line(error)})") from None
        return np.ascontiguousarray(values.reshape(*window.size[::-1], -1).T)

    def close(self) -> None:
        """Nothing is held open."""


def _voxels(path: Path, image: nib.spatialimages.SpatialImage, shape: tuple[int, ...]) -> Mapped | Sliced:
    found = image.dataobj
    if isinstance(found, ArrayProxy):
        require_proxy_size(path, image)
        factors = getattr(found, "scaling", None)  # AFNI: one a volume
        return mapped(path, found, shape, None if factors is None else np.asarray(factors, dtype=np.float64))
    if isinstance(image, PARRECImage):
        data = Path(str(image.file_map["image"].filename))
        assert isinstance(found, PARRECArrayProxy)
        found.file_like.close()  # nibabel leaves it open; by name it is opened for each read
        found.file_like = str(data)
        voxels = int(np.prod(image.header.get_rec_shape(), dtype=object))
        require_size(path, data, voxels * image.header.get_data_dtype().itemsize)
    return Sliced(path, image)


def open_pair(path: Path) -> FileSource:
    """A `.hdr` + `.img` pair: NIfTI when its header says so, else Analyze."""
    require_file(path)
    header = path.with_suffix(".hdr")
    with (header if header.exists() else path).open("rb") as file:
        magic = file.read(348)[344:347]
    return NiftiSource(path) if magic in (b"ni1", b"n+1") or len(magic) < 3 else NeuroSource(path)


def open_minc(path: Path) -> FileSource:
    """MINC-2 (HDF5) by ITK, MINC-1 (netCDF) by nibabel."""
    require_file(path)
    with path.open("rb") as file:
        return itk.ItkSource(path) if file.read(4) == HDF5 else NeuroSource(path)


def parts(path: Path) -> tuple[Path, ...]:
    """The header and its data file: `.HEAD` + `.BRIK`(`.gz`), `.PAR` + `.REC`."""
    pairs = {".head": (".BRIK", ".BRIK.gz", ".brik", ".brik.gz"), ".par": (".REC", ".rec")}
    stem = path.name[: -len(path.suffix)]
    data = (path.with_name(stem + end) for end in pairs.get(path.suffix.lower(), ()))
    return (path, *[p for p in data if p.exists()][:1])
