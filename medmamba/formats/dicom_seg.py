"""Labels out as a DICOM segmentation (SEG) that references the slices it was made from, and back in.

LABELMAP with RLE by default (one frame a slice, any number of labels), BINARY for older viewers (one frame a slice and
label). Identifiers come from a key and dates from the study: the same case gives the same bytes. Positions stand frame
by frame as the source has them, so a tilted gantry's stack is held as it is.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.pixels import iter_pixels
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DA, TM

from medmamba.errors import ConfigError, InputError
from medmamba.files import atomic_write
from medmamba.formats.dicom import DicomSource
from medmamba.formats.dicom_files import Member
from medmamba.formats.dicom_frames import Frame, reading
from medmamba.formats.dicom_stack import stack
from medmamba.grid import RAS, Grid

KINDS = {"labelmap": RLELossless, "binary": ExplicitVRLittleEndian}
ANATOMY = ("SCT", "123037004", "Anatomical Structure")
PRIVATE = "99MEDMAMBA"  # the scheme of labels without a code of their own
VALUE = "label value "
NO_DATE, NO_TIME = "19000101", "000000"  # where the study tells none (taken out for privacy)
FAULTS = (ValueError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What the labels mean: `names` by value, `codes` by value: type and category as (scheme, value, meaning),
    `colours` by value (red, green, blue in 0..1); and by whom: `maker` a bundle's name, `version` its id."""

    names: Mapping[int, str]
    maker: str
    version: str
    codes: Mapping[int, Mapping[str, tuple[str, str, str]]] = field(default_factory=dict)
    colours: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


def write_seg(
    path: Path, labels: np.ndarray, source: DicomSource, segments: Segments, *, key: str, kind: str = "labelmap"
) -> None:
    """Labels (z, y, x) on the grid of `source` as SEG; re-read and compared before the file gets its name.

    `key` decides the identifiers. Raises InputError("bad_header") when the headers of the source do not allow a SEG
    (no study, no frame of reference), output_mismatch when what is read back differs; ConfigError for another `kind`.
    """
    if kind not in KINDS:
        raise ConfigError(f"DICOM segmentation {kind!r} unknown; known: {', '.join(KINDS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = _segmentation(labels, source, segments, key, kind)
        except FAULTS as error:
            line = " ".join(str(error).split())[:200]
            raise InputError("bad_header", f"{source.path}: its headers do not allow a DICOM SEG ({line})") from None
        with atomic_write(path) as file:
            dataset.save_as(file, enforce_file_format=True)
            file.flush()
            again, _ = read_seg(Path(file.name), source.grid)
            if not np.array_equal(again, labels):
                raise InputError(
                    "output_mismatch", f"{path}: labels read back differ from those written; check the disk"
                )


def read_seg(path: Path, grid: Grid | None = None) -> tuple[np.ndarray, Grid]:
    """Labels (z, y, x) unsigned of a SEG and their grid: its own (it must hold all slices) or `grid`, where it lies.

    Raises InputError: corrupt_file, or bad_geometry when a frame does not lie on `grid`.
    """
    member = Member(str(path), path.stat().st_size, lambda: path.open("rb"), path)
    with reading(str(path)):
        head = dcmread(path, stop_before_pixels=True)
        values = {int(s.SegmentNumber): _value(s) for s in head.SegmentSequence}
        places = [(np.array(p, dtype=np.float64), n) for p, n in _places(head)]
    if grid is None:
        grid = _grid_of(path, head, [p for p, _ in places])
    labels = np.zeros(grid.shape, dtype=np.min_scalar_type(max(values.values())))
    back = np.linalg.inv(grid.affine)
    with reading(str(path)), member.open() as file:
        for (position, number), frame in zip(places, iter_pixels(file, raw=True), strict=True):  # type: ignore[arg-type]
            index = back @ np.array([-position[0], -position[1], position[2], 1.0])
            z = round(float(index[0]))
            if np.abs(index[:3] - (z, 0, 0)).max() > 1e-2 or not 0 <= z < grid.shape[0]:
                raise InputError("bad_geometry", f"{path}: a frame at {position.tolist()} does not lie on the grid")
            if number is None:
                lookup = np.zeros(max(int(frame.max()), *values) + 1, dtype=labels.dtype)
                lookup[list(values)] = list(values.values())
                labels[z] = lookup[frame]
            else:
                labels[z][frame.reshape(grid.shape[1:]) > 0] = values[number]
    return labels, grid


def _segmentation(labels: np.ndarray, source: DicomSource, segments: Segments, key: str, kind: str) -> Segmentation:
    frames = source.frames[0]
    heads = _source_headers(frames)
    values = sorted(v for v in segments.names if v)
    binary = kind == "binary"
    numbers = {v: i for i, v in enumerate(values, start=1)} if binary else {v: v for v in values}
    lookup = np.zeros(max(values) + 1, dtype=np.min_scalar_type(max(numbers.values())))
    lookup[list(numbers)] = list(numbers.values())
    first = heads[0]
    date, time = _when(first)
    dataset = Segmentation(
        source_images=heads,
        pixel_array=lookup[labels],
        segmentation_type=SegmentationTypeValues.BINARY if binary else SegmentationTypeValues.LABELMAP,
        segment_descriptions=[_description(v, numbers[v], segments) for v in values],
        series_instance_uid=uid(key, first.SeriesInstanceUID, "series"),
        series_number=900,
        sop_instance_uid=uid(key, first.SeriesInstanceUID, "instance", kind),
        instance_number=1,
        manufacturer="medmamba",
        manufacturer_model_name=segments.maker[:64],
        software_versions=version("medmamba"),
        device_serial_number=segments.version[:64],
        transfer_syntax_uid=KINDS[kind],
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=frames[0].spacing, slice_thickness=frames[0].thickness or source.grid.spacing[0]
        ),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", frames[0].orientation),
        plane_positions=[hd.PlanePositionSequence("PATIENT", f.position) for f in frames],
        omit_empty_frames=binary,
        content_label="SEGMENTATION",
        series_description=f"{segments.maker} segmentation"[:64],
        content_date=date,
        content_time=time,
        series_date=date,
        series_time=time,
    )
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = DA(date), TM(time)
    for value, item in zip(values, dataset.SegmentSequence[-len(values) :], strict=True):
        item.SegmentDescription = f"{VALUE}{value}"
    _settle(dataset, uid(key, first.SeriesInstanceUID, "dimensions"), f"{date}{time}")
    return dataset


def uid(*parts: str) -> str:
    """A unique identifier (2.25.*) made of texts: the same texts, the same identifier."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _description(value: int, number: int, segments: Segments) -> SegmentDescription:
    name = segments.names[value]
    own = segments.codes.get(value, {})
    kind = own.get("type", (PRIVATE, f"LABEL-{value}", name[:64]))
    algorithm = hd.AlgorithmIdentificationSequence(
        name=segments.maker[:64], family=codes.DCM.ArtificialIntelligence, version=segments.version[:64]
    )
    colour = segments.colours.get(value)
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=_code(own.get("category", ANATOMY)),
        segmented_property_type=_code(kind),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*(round(255 * c) for c in colour)) if colour else None,
    )


def _code(triple: tuple[str, str, str]) -> Code:
    scheme, value, meaning = triple
    return Code(value=value, scheme_designator=scheme, meaning=meaning)


def _source_headers(frames: tuple[Frame, ...]) -> list[Dataset]:
    """Headers of the files of one volume in order of its slices, with what a segmentation must copy put right."""
    files = list(dict.fromkeys(f.member for f in frames))
    heads = []
    for member in files:
        with reading(member.name), member.open() as file:
            heads.append(_put_right(dcmread(file, stop_before_pixels=True, defer_size=2**20)))  # type: ignore[arg-type]
    if len(heads) > 1 and any("PerFrameFunctionalGroupsSequence" in head for head in heads):
        raise ValueError("one volume in several multi-frame files cannot be referenced")
    return heads


def _put_right(head: Dataset) -> Dataset:
    """Empty what must be there and is not, or holds what the standard does not allow."""
    for keyword in ("PatientID", "PatientName", "AccessionNumber", "StudyID", "PatientBirthDate", "PatientSex"):
        if keyword not in head:
            setattr(head, keyword, "")
    if str(head.PatientSex) not in ("M", "F", "O", ""):
        head.PatientSex = ""
    for keyword, kind in (("StudyDate", DA), ("StudyTime", TM), ("PatientBirthDate", DA)):
        try:
            kind(head.get(keyword) or "")
        except ValueError:
            setattr(head, keyword, "")
        if keyword not in head:
            setattr(head, keyword, "")
    return head


def _when(head: Dataset) -> tuple[str, str]:
    """Date and time of the study, as text."""
    date, time = str(head.get("StudyDate") or ""), str(head.get("StudyTime") or "")
    return (date, time or NO_TIME) if date else (NO_DATE, NO_TIME)


def _settle(dataset: Dataset, dimensions: str, moment: str) -> None:
    """What highdicom draws at random comes from the key; what it takes from the clock, from the study."""
    for equipment in dataset.get("ContributingEquipmentSequence", ()):
        if equipment.get("ManufacturerModelName") == "highdicom":
            equipment.ContributionDateTime = moment
    for group in (dataset.DimensionOrganizationSequence, dataset.get("DimensionIndexSequence", ())):
        for item in group:
            item.DimensionOrganizationUID = dimensions


def _value(segment: Dataset) -> int:
    """The label value of a segment: as we noted it, else its number."""
    text = str(segment.get("SegmentDescription", ""))
    digits = text.removeprefix(VALUE)
    return int(digits) if text.startswith(VALUE) and digits.isdigit() else int(segment.SegmentNumber)


def _places(head: Dataset) -> Iterator[tuple[Any, int | None]]:
    """Position (LPS mm) of every frame, and its segment (None when the pixels say it)."""
    shared = head.SharedFunctionalGroupsSequence[0]
    for item in head.PerFrameFunctionalGroupsSequence:
        named = [g for g in (item, shared) if "SegmentIdentificationSequence" in g]
        number = int(named[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber) if named else None
        yield item.PlanePositionSequence[0].ImagePositionPatient, number


def _grid_of(path: Path, head: Dataset, positions: list[np.ndarray]) -> Grid:
    shared = head.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    places = np.unique(np.array(positions), axis=0)
    turn = np.array([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient])
    thick = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness")
    found = stack(
        str(path),
        places,
        np.tile(turn, (len(places), 1)),
        [float(v) for v in measures.PixelSpacing],
        thickness=float(thick) if thick else None,
        numbers=[None] * len(places),
    )
    return Grid((len(places), int(head.Rows), int(head.Columns)), found.affine, RAS)
