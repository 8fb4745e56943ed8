"""GeoTIFF, COG, VRT, JPEG 2000 in (`geo.raster`); out: slabs into journalled scratch rows, then a COG in one pass.

A kill before the pass resumes behind the last slab, a kill inside it repeats the pass; the file is the same, byte for
byte, and appears whole or not at all. GDAL's COG driver does the pass in bounded memory, reading the scratch rows
through a raw VRT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import rasterio.shutil

from geo.crs import crs_of, transform_of
from geo.raster import RasterSource, raster_env
from medmamba.errors import ConfigError, InputError, ShapeError
from medmamba.files import MODE, TEMPORARY, step, sync_folder
from medmamba.grid import PIXELS, Grid
from medmamba.scratch import Journal, ScratchMap
from medmamba.windows import Window

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".j2k")
NODATA, UNOBSERVABLE = 255, 254  # of every class raster; 255 of the confidence raster too
TILE = 512
TYPES = {
    **{"uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32"},
    **{"float32": "Float32", "float64": "Float64"},
}
OVERVIEWS = {"classes": "MODE", "continuous": "AVERAGE"}  # how a coarser level is made, by what the numbers are


def find(folder: Path) -> list[Path]:
    """Rasters below a folder, sorted; bands inside a SAFE product are that product's."""
    files = (p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
    return sorted(p for p in files if not any(part.endswith(".SAFE") for part in p.parts))


def open_geotiff(path: Path) -> RasterSource:
    """A raster as a Source. Raises InputError as RasterSource does."""
    return RasterSource(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What a raster file holds: `kind` of numbers ("classes", "continuous"), type, nodata, one description a band.

    `names` and `colours` (r, g, b) by class; `scale`, `offset`: value = stored * scale + offset; `tags` free text.
    """

    kind: str
    dtype: str
    bands: tuple[str, ...]
    nodata: float | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    colours: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    scale: float = 1.0
    offset: float = 0.0
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in OVERVIEWS or self.dtype not in TYPES:
            raise ConfigError(f"layer {self.kind!r} of {self.dtype!r}; known: {list(OVERVIEWS)} of {list(TYPES)}")
        if self.colours and (len(self.bands) != 1 or self.dtype != "uint8"):
            raise ConfigError("a TIFF carries a colour table only on one band of uint8: give each raster its own file")


def class_layer(names: Mapping[int, str], colours: Mapping[int, tuple[int, int, int]], **tags: str) -> Layer:
    """The layer of a class raster: uint8, 255 nodata, 254 not observable."""
    names = {**names, UNOBSERVABLE: "not observable", NODATA: "no data"}
    colours = {UNOBSERVABLE: (200, 200, 200), **colours}
    return Layer(
        kind="classes", dtype="uint8", bands=("class",), nodata=NODATA, names=names, colours=colours, tags=tags
    )


def confidence_layer(**tags: str) -> Layer:
    """The layer of a confidence raster: uint8 percent, 255 nodata."""
    return Layer(
        kind="continuous",
        dtype="uint8",
        bands=("confidence percent",),
        nodata=NODATA,
        scale=0.01,
        offset=0.0,
        tags=tags,
    )


def disk_needed(shape: tuple[int, int], layer: Layer) -> int:
    """Bytes of disk while the file is made, at worst: scratch, overviews of the pass (1/3) and the file (4/3)."""
    return round(int(np.prod(shape)) * len(layer.bands) * np.dtype(layer.dtype).itemsize * 8 / 3) + 2**20


class CogSink:
    """A Sink for numbers as stored, (C, rows, cols), slabs in order of rows; `close` makes the file.

    Slabs are of whole rows, or the raster comes in strips of columns that do not overlap, each in order of rows.
    `key` = hash of what the raster is made from (pair, bundle, settings). A process that comes after with the same key
    goes on where `finished` says. A `close` before every cell has come raises InputError("output_mismatch") and keeps
    the scratch rows.
    """

    def __init__(self, path: Path, grid: Grid, layer: Layer, *, key: str) -> None:
        self.path, self.grid, self.layer = path, grid, layer
        rows, cols = grid.shape
        folder = path.with_name(f".{path.name}.scratch")
        self.journal = Journal(folder, f"{key} {grid.shape} {layer.bands} {layer.dtype}")
        self.scratch = ScratchMap(
            folder / "rows", rows, (len(layer.bands), cols), np.dtype(layer.dtype).newbyteorder("<")
        )

    def finished(self, box: Window) -> int:
        """Rows from the top that last, of the strip of columns that the box covers: where the loop goes on."""
        return max((stop for name, stop in self.journal.finished if name == strip_of(box)), default=0)

    def write(self, window: Window, array: np.ndarray) -> None:
        """Makes a slab last before it returns; rows that last already may come again. Raises ShapeError for a gap."""
        expected, next_row = (len(self.layer.bands), *window.size), self.finished(window)
        if window.start[0] > next_row or array.shape != expected:
            raise ShapeError(
                f"slab {array.shape} at {window.start}: expected {expected} from row {next_row} of these columns on"
            )
        window.require_inside(self.grid.shape)
        self.scratch.write(window.start[0], np.moveaxis(array, 1, 0), window.start[1])
        if window.stop[0] > next_row:
            self.journal.add(strip_of(window), window.stop[0])

    def close(self) -> None:
        whole = np.zeros(self.grid.shape[1], dtype=bool)
        for columns, stop in self.journal.finished:
            if stop == self.grid.shape[0]:
                whole[slice(*map(int, columns.split(":")))] = True
        if not whole.all():
            last = self.finished(Window.whole(self.grid.shape))
            raise InputError("output_mismatch", f"{self.path}: rows from {last} on were never written")
        part = self.path.with_name(f".{self.path.name}{TEMPORARY}")
        for left in self.path.parent.glob(f".{self.path.name}{TEMPORARY}*"):
            left.unlink()
        vrt = self.scratch.path.with_name("rows.vrt")
        vrt.write_text(raw_vrt(self.scratch, self.grid, self.layer))
        with raster_env():
            rasterio.shutil.copy(vrt, part, driver="COG", **creation_options(self.layer))
        with part.open("rb+") as file:
            os.fchmod(file.fileno(), MODE)
            os.fsync(file.fileno())
        step("written", part)
        part.replace(self.path)
        sync_folder(self.path.parent)
        step("renamed", self.path)
        self.journal.remove()


def strip_of(box: Window) -> str:
    """The columns of a box, as the journal names them."""
    return f"{box.start[1]}:{box.stop[1]}"


def creation_options(layer: Layer) -> dict[str, str]:
    """The COG driver's options: tiled 512, DEFLATE, overviews by the kind of numbers, BigTIFF when it may be needed."""
    predictor = "FLOATING_POINT" if np.dtype(layer.dtype).kind == "f" else "NO"
    return {
        **{"COMPRESS": "DEFLATE", "PREDICTOR": predictor, "BLOCKSIZE": str(TILE), "BIGTIFF": "IF_SAFER"},
        **{"OVERVIEWS": "IGNORE_EXISTING", "OVERVIEW_RESAMPLING": OVERVIEWS[layer.kind], "NUM_THREADS": "1"},
    }


def raw_vrt(scratch: ScratchMap, grid: Grid, layer: Layer) -> str:
    """A GDAL VRT over the scratch rows (rows, bands, cols) beside it, with the georeference and what the layer says."""
    rows, cols = grid.shape
    crs = crs_of(grid.frame)
    tags = {**layer.tags, **{f"class_{value}": name for value, name in sorted(layer.names.items())}}
    lines = [f'<VRTDataset rasterXSize="{cols}" rasterYSize="{rows}">']
    if crs is not None:
        lines.append(f"<SRS>{escape(crs.to_wkt())}</SRS>")
    if grid.frame != PIXELS or not np.array_equal(grid.affine[:2, :2], [[0, 1], [1, 0]]):
        lines.append(f"<GeoTransform>{', '.join(repr(v) for v in transform_of(grid).to_gdal())}</GeoTransform>")
    lines += ["<Metadata>", *(f'<MDI key="{escape(k)}">{escape(v)}</MDI>' for k, v in sorted(tags.items()))]
    lines.append("</Metadata>")
    size = scratch.dtype.itemsize
    for band, name in enumerate(layer.bands):
        kind = TYPES[layer.dtype]
        lines.append(f'<VRTRasterBand dataType="{kind}" band="{band + 1}" subClass="VRTRawRasterBand">')
        lines.append(f"<Description>{escape(name)}</Description>")
        if layer.nodata is not None:
            lines.append(f"<NoDataValue>{layer.nodata!r}</NoDataValue>")
        if layer.colours:
            entries = (layer.colours.get(i, (0, 0, 0)) for i in range(256))
            table = "".join(f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="255"/>' for r, g, b in entries)
            lines.append(f"<ColorInterp>Palette</ColorInterp><ColorTable>{table}</ColorTable>")
        if (layer.scale, layer.offset) != (1.0, 0.0):
            lines.append(f"<Offset>{layer.offset!r}</Offset><Scale>{layer.scale!r}</Scale>")
        lines.append(f'<SourceFilename relativeToVRT="1">{escape(scratch.path.name)}</SourceFilename>')
        lines.append(f"<ImageOffset>{band * cols * size}</ImageOffset><PixelOffset>{size}</PixelOffset>")
        lines.append(f"<LineOffset>{scratch.row_bytes}</LineOffset><ByteOrder>LSB</ByteOrder></VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"])
