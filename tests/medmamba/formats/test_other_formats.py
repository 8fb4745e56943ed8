"""Formats beside NIfTI: one volume written by the library that owns each format, read back at its very place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from medmamba.formats import FORMATS
from medmamba.formats.nifti import NiftiSource, read_labels, write_labels
from medmamba.grid import Grid
from medmamba.source import read_all
from medmamba.windows import Window
from pipelines.cases.contents import content_hash
from pipelines.cases.formats import open_source, parts_of

XYZ = (5, 6, 7)
VALUES = np.random.default_rng(0).integers(-900, 900, XYZ).astype(np.int16)  # x, y, z
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])  # 3-4-5: orthonormal without rounding
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN * [0.7, 0.9, 2.5], (-31.4, 12.2, 7.7)
SHEARED = AFFINE.copy()
SHEARED[:3, 2] += (0, 0.6, 0)  # a tilted gantry
FLIP = np.diag([-1.0, -1.0, 1.0])


def by_itk(affine: np.ndarray, *, compress: bool = False) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        image = SimpleITK.GetImageFromArray(VALUES.T)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin((FLIP @ affine[:3, 3]).tolist())
        image.SetDirection((FLIP @ affine[:3, :3] / spacing).ravel().tolist())
        SimpleITK.WriteImage(image, str(path), useCompression=compress)
        return path

    return write


def by_nibabel(kind: type, dtype: str = "int16") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        nib.save(kind(VALUES.astype(dtype), AFFINE), path)
        return path

    return write


def analyze(path: Path) -> Path:
    """Plain Analyze: no affine but the spacing."""
    nib.save(nib.AnalyzeImage(VALUES, np.diag([-0.7, 0.9, 2.5, 1])), path)
    return path


def sheared_nrrd(path: Path) -> Path:
    """By hand: ITK would not write it."""
    lps = FLIP @ SHEARED[:3, :3]
    vectors = " ".join("({:.17g},{:.17g},{:.17g})".format(*lps[:, a]) for a in range(3))
    origin = "({:.17g},{:.17g},{:.17g})".format(*(FLIP @ SHEARED[:3, 3]))
    head = (
        f"NRRD0005\ntype: int16\ndimension: 3\nspace: left-posterior-superior\nsizes: {XYZ[0]} {XYZ[1]} {XYZ[2]}\n"
        f"space directions: {vectors}\nendian: little\nencoding: raw\nspace origin: {origin}\n\n"
    )
    path.write_bytes(head.encode() + VALUES.astype("<i2").tobytes(order="F"))
    return path


CASES: dict[str, tuple[Callable[[Path], Path], np.ndarray | None]] = {
    "a.nrrd": (by_itk(AFFINE), AFFINE),
    "packed.nrrd": (by_itk(AFFINE, compress=True), AFFINE),
    "sheared.nrrd": (sheared_nrrd, SHEARED),
    "a.nhdr": (by_itk(AFFINE), AFFINE),
    "a.mha": (by_itk(AFFINE), AFFINE),
    "packed.mha": (by_itk(AFFINE, compress=True), AFFINE),
    "sheared.mha": (by_itk(SHEARED), SHEARED),
    "a.mhd": (by_itk(AFFINE), AFFINE),
    "packed.mhd": (by_itk(AFFINE, compress=True), AFFINE),
    "a.mgz": (by_nibabel(nib.MGHImage, "float32"), AFFINE),
    "a.mgh": (by_nibabel(nib.MGHImage, "int32"), AFFINE),
    "two.nii.gz": (by_nibabel(nib.Nifti2Image), AFFINE),
    "pair.hdr": (by_nibabel(nib.Nifti1Pair), AFFINE),
    "spm.hdr": (by_nibabel(nib.Spm99AnalyzeImage), AFFINE),
    "plain.img": (analyze, None),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_place_are_those_that_were_written(name: str, tmp_path: Path) -> None:
    write, affine = CASES[name]
    source = open_source(write(tmp_path / name))
    whole = read_all(source).array
    assert np.array_equal(whole[0], VALUES.T)
    if affine is not None:
        assert source.grid.matches(Grid(XYZ[::-1], affine[:, [2, 1, 0, 3]], source.grid.frame), tolerance=1e-5)
    else:
        np.testing.assert_allclose(source.grid.affine[:3, :3], [[0, 0, -0.7], [0, 0.9, 0], [2.5, 0, 0]], atol=1e-6)
        assert "Analyze" in source.notes[0]
    window = Window(start=(2, 1, 0), size=(3, 4, 5))
    part = source.read(window)
    assert np.array_equal(part.array[0], whole[0][window.slices])
    assert part.grid == source.grid.crop(window.start, window.size)
    source.close()
    assert np.array_equal(source.read(window).array, part.array)  # opens again


@pytest.mark.parametrize("name", ["sheared.nrrd", "packed.mha", "a.mgz", "plain.img"])
def test_labels_go_out_as_nifti_on_the_same_grid(name: str, tmp_path: Path) -> None:
    source = open_source(CASES[name][0](tmp_path / name))
    labels = np.random.default_rng(1).integers(0, 3, source.grid.shape).astype(np.int32)
    write_labels(tmp_path / "out.nii.gz", labels, source)
    again, grid = read_labels(tmp_path / "out.nii.gz")
    assert np.array_equal(again, labels)
    assert grid.matches(source.grid, tolerance=1e-5)
    header = nib.load(tmp_path / "out.nii.gz").header
    assert int(header["qform_code"]) == (0 if "sheared" in name else 1)  # a qform cannot hold a shear


@given(st.integers(0, 10**6))
def test_random_affines_survive_nrrd_and_meta(seed: int) -> None:
    import tempfile

    affine = np.eye(4)
    rng = np.random.default_rng(seed)
    affine[:3, :3], affine[:3, 3] = rng.normal(size=(3, 3)) + 2 * np.eye(3), rng.normal(size=3) * 100
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.nrrd", "a.mha"):
            source = open_source(by_itk(affine)(Path(folder) / name))
            assert source.grid.matches(Grid(XYZ[::-1], affine[:, [2, 1, 0, 3]], source.grid.frame), tolerance=1e-5)


def test_all_parts_of_an_image_count(tmp_path: Path) -> None:
    """The voxels of a .mhd lie in its .raw: a change there must change the contents' hash."""
    path = by_itk(AFFINE)(tmp_path / "a.mhd")
    assert [p.name for p in parts_of(path)] == ["a.mhd", "a.raw"]
    before = content_hash(path)
    raw = bytearray((tmp_path / "a.raw").read_bytes())
    raw[0] ^= 1
    (tmp_path / "a.raw").write_bytes(raw)
    assert content_hash(path) != before


def stack(path: Path, **options: object) -> Path:
    tifffile.imwrite(path, VALUES.T.astype(np.uint16), photometric="minisblack", **options)  # type: ignore[arg-type]
    return path


def test_tiff_stacks(tmp_path: Path) -> None:
    """Spacing from ImageJ's and OME's own words; what a TIFF does not say is told."""
    resolution = {"resolution": (1 / 0.5, 1 / 0.25)}
    imagej = stack(
        tmp_path / "i.tif", imagej=True, metadata={"axes": "ZYX", "spacing": 2.0, "unit": "mm"}, **resolution
    )
    sizes = {f"PhysicalSize{a}": s for a, s in (("X", 500), ("Y", 250), ("Z", 2000))}
    ome = stack(tmp_path / "o.ome.tif", ome=True, metadata={"axes": "ZYX", **sizes}, compression="zlib")
    for path in (imagej, ome):
        source = open_source(path)
        np.testing.assert_allclose(source.grid.spacing, (2.0, 0.25, 0.5), rtol=1e-6)
        assert np.array_equal(read_all(source).array[0], VALUES.T.astype(np.uint16))
        assert len(source.notes) == 1
    bare = open_source(stack(tmp_path / "b.tif"))
    assert bare.grid.spacing == (1.0, 1.0, 1.0)
    assert sum("no spacing" in note for note in bare.notes) == 3
    tifffile.imwrite(
        tmp_path / "c.tif", VALUES.T.astype(np.uint8).reshape(7, 2, 3, 5), imagej=True, metadata={"axes": "ZCYX"}
    )
    many = open_source(tmp_path / "c.tif")
    assert (len(many.channels), many.grid.shape) == (2, (7, 3, 5))
    assert np.array_equal(read_all(many).array, VALUES.T.astype(np.uint8).reshape(7, 2, 3, 5).transpose(1, 0, 2, 3))


def test_a_plane_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(VALUES[:, :, 0], np.diag([0.5, 0.25, 1, 1])), tmp_path / "plane.nii")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VALUES[:, :, 0].T), str(tmp_path / "plane.mha"))
    for name in ("plane.nii", "plane.mha"):
        source = open_source(tmp_path / name)
        assert source.grid.shape == (1, 6, 5)
        assert np.array_equal(read_all(source).array[0, 0], VALUES[:, :, 0].T)
        write_labels(tmp_path / "out.nii", np.ones(source.grid.shape, np.int32), source)
        assert NiftiSource(tmp_path / "out.nii").grid.matches(source.grid)


def test_units_of_length_become_mm(tmp_path: Path) -> None:
    for unit, factor in (("mm", 1.0), ("meter", 1000.0), ("micron", 1e-3), ("unknown", 1.0)):
        image = nib.Nifti1Image(VALUES, np.diag([0.5, 1, 2, 1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "u.nii")
        assert NiftiSource(tmp_path / "u.nii").grid.spacing == pytest.approx((2 * factor, factor, 0.5 * factor))


def test_samples_of_nibabel_agree_with_nibabel() -> None:
    """Files of scanners and other programs, shipped with nibabel: values and affine as it reads them."""
    folder = Path(os.path.dirname(nib.__file__)) / "tests" / "data"  # noqa: PTH120
    names = ["test.mgz", "example4d+orig.HEAD", "scaled+tlrc.HEAD", "phantom_EPI_asc_CLEAR_2_1.PAR", "tiny.mnc"]
    present = [folder / n for n in names if (folder / n).exists()]
    if not present:
        pytest.skip("this nibabel came without its test files")
    for path in present:
        source, image = open_source(path), nib.load(path)
        values = np.asanyarray(image.dataobj)
        getattr(getattr(image.dataobj, "file_like", None), "close", lambda: None)()  # nibabel leaves a .REC open
        expected = np.asarray(values).reshape(*values.shape[:3], -1).T
        np.testing.assert_allclose(read_all(source).array, expected, rtol=1e-6, err_msg=path.name)
        np.testing.assert_allclose(source.grid.affine, image.affine[:, [2, 1, 0, 3]], err_msg=path.name)


def test_minc2_lies_where_nibabel_says(shared: Path) -> None:
    """nibabel needs h5py for MINC-2, so its answer for this file stands here as numbers (x, y, z origin in RAS)."""
    source = open_source(shared / "data" / "formats" / "small.mnc")
    assert source.grid.shape == (18, 28, 29)
    np.testing.assert_allclose(source.grid.affine[:3], [[0, 0, 7, -98], [0, 8, 0, -134], [9, 0, 0, -72]])
    assert read_all(source).array.max() == pytest.approx(92.87690889, rel=1e-6)


def test_the_table_is_whole() -> None:
    suffixes = [s for reader in FORMATS.values() for s in reader.suffixes]
    assert len(suffixes) == len(set(suffixes)), "one reader a suffix"
    assert all(s == s.lower() and s.startswith(".") for s in suffixes)
