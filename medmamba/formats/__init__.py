"""Readers and writers of files, one format a file; axis order and origin are turned here and nowhere else."""

from medmamba.formats import nifti

FORMATS = {"nifti": nifti}
