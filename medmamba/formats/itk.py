"""NRRD, MetaImage and MINC-2, in, by SimpleITK; its LPS is turned to RAS here.

An uncompressed MetaImage is read by window; the others have no random access, so the first read brings the whole image
into a scratch file. ITK reads MINC-2 without turning its RAS, so that nothing is turned back there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmamba.errors import InputError
from medmamba.formats.opening import file_grid, file_shape, one_line, require_beside, require_file, require_size
from medmamba.sample import Image
from medmamba.windows import Window

if TYPE_CHECKING:
    import SimpleITK

META, NRRD, MINC = (".mha", ".mhd"), (".nrrd", ".nhdr"), (".mnc",)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
HEADER_BYTES = 1 << 16
UNPLACED = "the file does not say where it lies in the patient: axes taken as left, posterior, superior"


class ItkSource:
    """A file as a Source: (C, z, y, x), C the components or the 4th axis, RAS+ mm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        fields = header_fields(path)
        data = data_file(path, fields)
        reader = _reader(path)
        sizes, dims = reader.GetSize(), reader.GetDimension()
        spatial, volumes = file_shape(path, sizes)
        components = reader.GetNumberOfComponents()
        if components > 1 and volumes > 1:
            raise InputError(
                "wrong_channels", f"{path}: {volumes} volumes of {components} components; expected one kind"
            )
        self.grid = file_grid(path, spatial, _affine(reader, turned=path.suffix.lower() not in MINC))
        self.channels = tuple(f"{i}" for i in range(volumes * components))
        self.dtype = _dtype(path, reader)
        self._components, self._dims = components, dims
        claimed = int(np.prod([*sizes, components], dtype=object)) * self.dtype.itemsize
        packed = fields.get("compresseddata", "false").lower() == "true" or fields.get("encoding", "raw") != "raw"
        require_size(path, data, claimed, packed=packed or path.suffix.lower() in MINC)
        self._by_window = path.suffix.lower() in META and not packed
        placed = path.suffix.lower() not in NRRD or bool({"space", "space directions"} & set(fields))
        self.notes = () if placed else (UNPLACED,)
        self._array: np.ndarray | None = None

    def read(self, window: Window) -> Image:
        window.require_inside(self.grid.shape)
        if self._by_window:
            array = self._extract(window)
        else:
            if self._array is None:
                self._array = self._scratch()
            array = np.array(self._array[(slice(None), *window.slices)])
        return Image(array, self.grid.crop(window.start, window.size), self.channels)

    def close(self) -> None:
        """Lets the scratch file go."""
        self._array = None

    def _extract(self, window: Window) -> np.ndarray:
        """(C, *window.size) read by ITK; axes beyond the third are taken whole."""
        reader = _reader(self.path)
        sizes = list(reader.GetSize())
        start, size = list(window.start[::-1]), list(window.size[::-1])
        reader.SetExtractIndex([*start[: self._dims], *([0] * (self._dims - 3))])
        reader.SetExtractSize([*size[: self._dims], *sizes[3:]])
        import SimpleITK

        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise InputError("corrupt_file", f"{self.path}: voxels cannot be read ({_told(error)})") from None
        array = SimpleITK.GetArrayViewFromImage(image)  # valid while `image` lives
        if self._components > 1:
            array = np.moveaxis(array, -1, 0)
        return np.array(array.reshape(len(self.channels), *window.size), dtype=self.dtype)

    def _scratch(self) -> np.ndarray:
        whole = self._extract(Window.whole(self.grid.shape))
        with tempfile.TemporaryFile() as scratch:  # has no name: gone with the process, however that ends
            scratch.write(whole.tobytes())
            scratch.flush()
            return np.memmap(scratch, dtype=self.dtype, mode="r", shape=whole.shape)


def header_fields(path: Path) -> dict[str, str]:
    """The text fields of a MetaImage or NRRD header, names in lower case; empty for MINC."""
    fields: dict[str, str] = {}
    if path.suffix.lower() in MINC:
        return fields
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    sign, until = (b"=", b"elementdatafile") if path.suffix.lower() in META else (b":", b"")
    for line in head.split(b"\n"):
        name, found, value = line.partition(sign)
        key = name.strip().lower()
        if found:
            fields[key.decode("latin-1")] = value.lstrip(b"=").strip().decode("latin-1")
        if key == until:
            break
    return fields


def data_file(path: Path, fields: dict[str, str]) -> Path:
    """The file that holds the voxels. Raises InputError for many of them, or one outside the header's folder."""
    name = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    if name == "LOCAL":
        return path
    if name.startswith("LIST") or "%" in name:
        raise InputError("unsupported_format", f"{path}: spread over several data files; convert it to one")
    return require_beside(path, name)


def parts(path: Path) -> tuple[Path, ...]:
    """The header and its data file."""
    try:
        data = data_file(path, header_fields(path))
    except InputError:  # `open` will say it
        return (path,)
    return (path,) if data == path or not data.exists() else (path, data)


def _reader(path: Path) -> SimpleITK.ImageFileReader:
    """A reader that knows the header. Raises InputError("corrupt_file")."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError("corrupt_file", f"{path}: not readable ({_told(error)}); copy it again") from None
    return reader


def _affine(reader: SimpleITK.ImageFileReader, *, turned: bool) -> np.ndarray:
    """Index x, y, z -> RAS, (4, 4); a plane gets a third axis."""
    dims = reader.GetDimension()
    spacing, origin = np.ones(3), np.zeros(3)
    direction = np.eye(3)
    n = min(dims, 3)
    spacing[:n], origin[:n] = reader.GetSpacing()[:n], reader.GetOrigin()[:n]
    direction[:n, :n] = np.reshape(reader.GetDirection(), (dims, dims))[:n, :n]
    affine = np.eye(4)
    turn = LPS_TO_RAS if turned else np.eye(3)
    affine[:3, :3], affine[:3, 3] = turn @ direction * spacing, turn @ origin
    return affine


def _dtype(path: Path, reader: SimpleITK.ImageFileReader) -> np.dtype:
    import SimpleITK

    name = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()).removeprefix("vector of ")
    known = {"32-bit float": "float32", "64-bit float": "float64"} | {
        f"{bits}-bit {sign}signed integer": f"{'u' if sign else ''}int{bits}"
        for bits in (8, 16, 32, 64)
        for sign in ("", "un")
    }
    if name not in known:
        raise InputError("unsupported_format", f"{path}: voxels of type {name}; expected integers or floats")
    return np.dtype(known[name])


def _told(error: RuntimeError) -> str:
    """The last sentence of an ITK error, without the places in ITK's own code."""
    return one_line(error).rpartition("ITK ERROR: ")[2][:200]
