"""Maker of tiny DICOM series: headers as scanners write them, any damage by changing a dataset before it is saved."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian

STUDY, SERIES, FRAME_OF_REFERENCE = "1.2.3.4", "1.2.3.4.5", "1.2.3.4.9"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ORIGIN, STEP, PIXEL = (-31.5, 12.25, 100.0), 2.0, (0.8, 0.7)


def values(count: int = 20, rows: int = 12, columns: int = 10, seed: int = 0) -> np.ndarray:
    """Stored numbers (z, y, x) int16, negative ones too."""
    return np.random.default_rng(seed).integers(-500, 1500, (count, rows, columns)).astype(np.int16)


def slice_of(array: np.ndarray, number: int, position: Any, *, series: str = SERIES, **changes: Any) -> FileDataset:
    """One CT slice (rows, columns) int16; `changes` set or (None) remove elements."""
    data = dataset(CTImageStorage, f"{series}.{number}", series)
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.InstanceNumber = number
    data.ImagePositionPatient = [f"{v:.6f}".rstrip("0").rstrip(".") for v in position]
    data.ImageOrientationPatient = list(AXIAL)
    data.PixelSpacing, data.SliceThickness = list(PIXEL), STEP
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    put_pixels(data, array)
    for keyword, value in changes.items():
        if value is None:
            del data[keyword]
        else:
            setattr(data, keyword, value)
    return data


def dataset(kind: str, instance: str, series: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = kind, instance
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, series, FRAME_OF_REFERENCE
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "P1", "Doe^Jane", "19700101", "F"
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20240102", "030405", "7", "A7"
    data.Modality = "CT" if kind == CTImageStorage else "MR"
    data.Manufacturer, data.PositionReferenceIndicator = "maker", ""
    return data


def put_pixels(data: Dataset, array: np.ndarray) -> None:
    """Pixels (rows, columns) or (frames, rows, columns), stored as they are."""
    data.Rows, data.Columns = array.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = array.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    data.PixelData = array.astype(array.dtype.newbyteorder("<")).tobytes()
    data["PixelData"].VR = "OW" if array.dtype.itemsize > 1 else "OB"


def series(
    count: int = 20, *, lean: float = 0.0, array: np.ndarray | None = None, uid: str = SERIES, **changes: Any
) -> list[FileDataset]:
    """Axial CT slices from below upwards, `lean` degrees of tilt."""
    planes = values(count) if array is None else array
    side = STEP * np.tan(np.radians(lean))
    return [
        slice_of(plane, i + 1, (ORIGIN[0], ORIGIN[1] + i * side, ORIGIN[2] + i * STEP), series=uid, **changes)
        for i, plane in enumerate(planes)
    ]


def save(folder: Path, slices: list[FileDataset], name: Callable[[int], str] = "IM{:04d}".format) -> Path:
    """Writes slices under names that do not follow their order, without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(slices):
        data.save_as(folder / name((i * 7919) % 10007), enforce_file_format=True)
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def multiframe(array: np.ndarray, depths: list[float], times: list[int] | None = None, number: int = 1) -> FileDataset:
    """An enhanced MR of frames (n, rows, columns) at depths (mm along z), value = stored * 2 + 10."""
    data = dataset(EnhancedMRImageStorage, f"{SERIES}.{number}", SERIES)
    data.InstanceNumber, data.NumberOfFrames = number, len(array)
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing, shared.PixelMeasuresSequence[0].SliceThickness = list(PIXEL), STEP
    shared.PixelValueTransformationSequence = [Dataset()]
    rule = shared.PixelValueTransformationSequence[0]
    rule.RescaleSlope, rule.RescaleIntercept, rule.RescaleType = 2, 10, "US"
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], []
    for i, depth in enumerate(depths):
        item = Dataset()
        item.PlanePositionSequence, item.FrameContentSequence = [Dataset()], [Dataset()]
        item.PlanePositionSequence[0].ImagePositionPatient = [ORIGIN[0], ORIGIN[1], depth]
        item.FrameContentSequence[0].TemporalPositionIndex = times[i] if times else 1
        data.PerFrameFunctionalGroupsSequence.append(item)
    put_pixels(data, array)
    return data
