"""One head in many headers through the whole of `predict`: the same labels, each under its own header."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
import torch
from torch import Tensor, nn

from medmamba.formats.nifti import GEOMETRY_FIELDS, NiftiSource
from medmamba.preprocessing import canonical_axes
from medmamba.source import PermutedSource, read_all
from medmamba.windows import Windowing
from pipelines.cases.case import Case
from pipelines.cases.formats import open_source, parts_of
from pipelines.serving.predict import Predictor, predict
from pipelines.tasks import build_task
from tests.ways.tiny import make_bundle


class Levels(nn.Module):
    """Three classes by brightness: a network whose labels follow the voxels and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x, x * 0 + 0.3, x - 0.5], dim=1)


def levels(folder: Path, window: int) -> Predictor:
    bundle = make_bundle(folder)
    windowing = Windowing(size=(window,) * 3, overlap=(0, 0, 0))
    bundle = replace(bundle, preprocessing=replace(bundle.preprocessing, windowing=windowing))
    return Predictor(bundle=bundle, network=Levels(), task=build_task(bundle.task), device=torch.device("cpu"))


def canonical_labels(predictor: Predictor, path: Path, output: Path) -> np.ndarray:
    """Labels of a file, read back and turned to z, y, x rising; their header checked against the input's."""
    name = path.name.removesuffix(".gz").removesuffix(".nii")
    predict(predictor, Case(id=name, files={"ct": path}), output)
    written = output / predictor.bundle.title / f"{name}_dseg.nii.gz"
    before, after = nib.load(path).header, nib.load(written).header
    for field in (*GEOMETRY_FIELDS, "pixdim"):
        assert before[field].tobytes() == after[field].tobytes(), (name, field)
    source = NiftiSource(written)
    return read_all(PermutedSource(source, *canonical_axes(source.grid))).array[0]


def test_real_axis_orders_give_the_same_labels(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "data" / "nifti_geometry").glob("[A-Z][A-Z][A-Z].nii.gz"))
    assert len(files) == 8
    predictor = levels(tmp_path / "bundle", 80)
    found = [canonical_labels(predictor, path, tmp_path / "out") for path in files]
    assert set(np.unique(found[0])) == {0, 1, 2}
    for other in found[1:]:
        assert np.array_equal(other, found[0])


def test_every_axis_order_gives_the_same_labels(tmp_path: Path) -> None:
    """All six orders, flips drawn, codes and units of every kind; the header comes back bit for bit."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1000, (9, 10, 11)).astype(np.int16)  # along x, y, z of the world
    predictor = levels(tmp_path / "bundle", 12)
    found = []
    for number, order in enumerate(permutations(range(3))):
        flips = rng.random(3) < 0.5
        turned = image.transpose(order)[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
        affine = np.zeros((4, 4))
        for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
            affine[world, axis] = (-1 if flip else 1) * (0.7, 0.9, 2.5)[world]
            affine[world, 3] = (0.7, 0.9, 2.5)[world] * (image.shape[world] - 1) * flip
        affine[3, 3] = 1
        nifti = nib.Nifti1Image(turned, affine)
        nifti.set_sform(affine, code=number % 5)
        nifti.set_qform(affine, code=(number + 1) % 5)
        nifti.header.set_xyzt_units("mm" if number % 2 else "unknown", "msec")
        nifti.header["descrip"] = b"scanner"
        nib.save(nifti, tmp_path / f"o{number}.nii")
        found.append(canonical_labels(predictor, tmp_path / f"o{number}.nii", tmp_path / "out"))
    assert set(np.unique(found[0])) == {0, 1, 2}
    for other in found[1:]:
        assert np.array_equal(other, found[0])


def test_every_format_goes_in_and_labels_come_out_as_nifti(tmp_path: Path) -> None:
    """The same voxels at the same place in five formats: the same labels, written where the input lies."""
    values = np.random.default_rng(0).integers(0, 1000, (9, 10, 11)).astype(np.int16)
    affine = np.diag([-0.7, -0.9, 2.5, 1])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    nib.save(nib.MGHImage(values.astype(np.int32), affine), tmp_path / "b.mgz")
    image = SimpleITK.GetImageFromArray(values.T)
    image.SetSpacing((0.7, 0.9, 2.5))
    for name in ("c.nrrd", "d.mhd", "e.mha"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
    predictor = levels(tmp_path / "bundle", 12)
    found = []
    for path in sorted(p for p in tmp_path.iterdir() if p.suffix in (".gz", ".mgz", ".nrrd", ".mhd", ".mha")):
        report = predict(predictor, Case(id=path.stem, files={"ct": path}), tmp_path / "out")
        written = NiftiSource(tmp_path / "out" / predictor.bundle.title / f"{path.stem}_dseg.nii.gz")
        assert written.grid.matches(open_source(path).grid)
        assert report.inputs["ct"]["size"] == sum(p.stat().st_size for p in parts_of(path))
        found.append(read_all(written).array[0])
    assert len(found) == 5
    assert set(np.unique(found[0])) == {0, 1, 2}
    for other in found[1:]:
        assert np.array_equal(other, found[0])
