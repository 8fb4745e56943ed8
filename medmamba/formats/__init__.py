"""Readers and writers of files, one format a file; axis order and origin are turned here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medmamba.formats import dicom, itk, neuro, nifti, tiff
from medmamba.source import FileSource


def itself(path: Path) -> tuple[Path, ...]:
    """A file that holds its whole image."""
    return (path,)


@dataclass(frozen=True, kw_only=True)
class Format:
    """`suffixes` (lower case) of the files, folders or archives that `open` reads as a Source, or refuses with an
    InputError; `parts` names all files of one image. `knows` tells by its first bytes a file that
    needs no suffix; a folder that holds such files is then one image, and `open` and `parts` take the folder.
    `images` names the images in a folder or archive that may hold several, by addresses that `open` takes."""

    title: str
    suffixes: tuple[str, ...]
    open: Callable[[Path], FileSource]
    parts: Callable[[Path], tuple[Path, ...]] = itself
    knows: Callable[[Path], bool] | None = None
    images: Callable[[Path], tuple[Path, ...]] = itself


FORMATS = {
    "nifti": Format(title="NIfTI-1 and NIfTI-2", suffixes=nifti.SUFFIXES, open=nifti.NiftiSource),
    "pair": Format(title="NIfTI pair, Analyze 7.5", suffixes=(".hdr", ".img"), open=neuro.open_pair, parts=nifti.parts),
    "mgh": Format(title="FreeSurfer", suffixes=(".mgz", ".mgh"), open=neuro.NeuroSource),
    "afni": Format(title="AFNI", suffixes=(".head",), open=neuro.NeuroSource, parts=neuro.parts),
    "parrec": Format(title="Philips PAR/REC", suffixes=(".par",), open=neuro.NeuroSource, parts=neuro.parts),
    "minc": Format(title="MINC", suffixes=itk.MINC, open=neuro.open_minc),
    "nrrd": Format(title="NRRD", suffixes=itk.NRRD, open=itk.ItkSource, parts=itk.parts),
    "tiff": Format(title="TIFF stack", suffixes=tiff.SUFFIXES, open=tiff.TiffSource),
    "meta": Format(title="MetaImage", suffixes=itk.META, open=itk.ItkSource, parts=itk.parts),
    "dicom": Format(
        title="DICOM series in a folder",
        suffixes=dicom.SUFFIXES,
        open=dicom.DicomSource,
        parts=dicom.parts,
        knows=dicom.knows,
        images=dicom.images,
    ),
    "dicom_zip": Format(
        title="DICOM in a zip", suffixes=(dicom.ZIP,), open=dicom.DicomSource, parts=dicom.parts, images=dicom.images
    ),
}
