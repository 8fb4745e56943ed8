import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import InputError
from medmamba.formats.nifti import GEOMETRY_FIELDS, NiftiSource, find, label_names, read_labels, write_labels
from medmamba.source import read_all
from medmamba.windows import Window

SHAPE = (5, 6, 7)


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def awkward_affines() -> dict[str, tuple[np.ndarray, bool]]:
    """The seven headers that peers get wrong: affine of the sform, and whether a qform is set beside it."""
    scale = np.diag([0.7, 0.9, 2.5])
    shear = np.eye(3)
    shear[1, 2] = np.tan(np.radians(15))
    noisy = rotation(10) @ scale + np.random.default_rng(0).normal(scale=1e-4, size=(3, 3))
    linear = {
        "aligned": scale,
        "flipped": scale @ np.diag([-1, -1, 1]),
        "permuted": scale[:, [2, 0, 1]],
        "oblique": rotation(23) @ scale,
        "noisy": noisy,
        "sheared, qform set": shear @ scale,
        "sheared, no qform": shear @ scale,
    }
    affines = {}
    for name, matrix in linear.items():
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, (-31.4, 12.2, 7.7)
        affines[name] = (affine, name != "sheared, no qform")
    return affines


def write(path: Path, affine: np.ndarray, *, qform: bool = True, data: np.ndarray | None = None) -> Path:
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if data is None else data
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code=2)
    if qform:
        rigid = affine.copy()
        image.set_qform(rigid, code=1, strip_shears=True)
    else:
        image.set_qform(None, code=0)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", sorted(awkward_affines()))
def test_labels_come_back_under_the_very_header(name: str, suffix: str, tmp_path: Path) -> None:
    affine, qform = awkward_affines()[name]
    source = NiftiSource(write(tmp_path / f"in{suffix}", affine, qform=qform))
    labels = np.random.default_rng(0).integers(0, 3, source.grid.shape).astype(np.int32)
    out = tmp_path / f"out{suffix}"
    write_labels(out, labels, source, names={1: "liver", 2: "spleen"})
    before, after = nib.load(tmp_path / f"in{suffix}").header, nib.load(out).header
    for field in (*GEOMETRY_FIELDS, "pixdim"):
        assert before[field].tobytes() == after[field].tobytes(), field
    np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj).T, labels)
    assert label_names(out) == {1: "liver", 2: "spleen"}
    again, grid = read_labels(out)
    assert grid == source.grid
    assert np.array_equal(again, labels)


@given(st.integers(0, 10**6))
def test_random_headers_come_back_bit_for_bit(seed: int) -> None:
    """Any affine, any sform and qform that need not agree, any codes, any unit, any description."""
    import tempfile

    rng = np.random.default_rng(seed)
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
    for place, setter in enumerate((image.set_sform, image.set_qform)):
        affine = np.eye(4)
        affine[:3, :3] = rng.normal(size=(3, 3)) + 2 * np.eye(3)
        affine[:3, 3] = rng.normal(size=3) * 100
        setter(affine, code=int(rng.integers(1 - place, 5)))
    image.header.set_xyzt_units(str(rng.choice(["mm", "micron", "unknown"])), "sec")
    image.header["descrip"] = rng.bytes(40).replace(b"\0", b"x")
    labels = rng.integers(0, 4, SHAPE[::-1]).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.nii", Path(folder) / "out.nii.gz"
        nib.save(image, path)
        write_labels(out, labels, NiftiSource(path))
        before, after = nib.load(path).header, nib.load(out).header
        for field in (*GEOMETRY_FIELDS, "pixdim", "descrip"):
            assert before[field].tobytes() == after[field].tobytes(), field
        assert np.array_equal(read_labels(out)[0], labels)


@given(st.integers(0, 10**6))
def test_random_affines_survive(seed: int) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    affine[:3, 3] = rng.normal(size=3) * 100
    with tempfile.TemporaryDirectory() as folder:
        source = NiftiSource(write(Path(folder) / "in.nii", affine))
        write_labels(Path(folder) / "out.nii", np.zeros(source.grid.shape, np.int32), source)
        assert NiftiSource(Path(folder) / "out.nii").grid == source.grid


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_window_read_is_a_slice_of_the_full_read(suffix: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(-500, 500, SHAPE).astype(">i2")
    image = nib.Nifti1Image(data, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / f"a{suffix}")
    source = NiftiSource(tmp_path / f"a{suffix}")
    whole = read_all(source).array
    np.testing.assert_allclose(whole[0], nib.load(tmp_path / f"a{suffix}").get_fdata().T, rtol=1e-6)
    window = Window(start=(2, 1, 0), size=(3, 4, 5))
    part = source.read(window)
    assert np.array_equal(part.array[0], whole[0][window.slices])
    assert part.grid == source.grid.crop((2, 1, 0), (3, 4, 5))
    assert source.grid.spacing == (3.0, 2.0, 1.0)


def test_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    source = NiftiSource(write(tmp_path / "in.nii", np.eye(4)))
    labels = np.random.default_rng(0).integers(0, 9, source.grid.shape).astype(np.int32)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, labels, source)
        assert np.array_equal(read_labels(tmp_path / name)[0], labels)  # without names, so without an extension
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_large_label_values_are_kept(tmp_path: Path) -> None:
    source = NiftiSource(write(tmp_path / "in.nii", np.eye(4)))
    labels = np.full(source.grid.shape, 70_000, np.int32)
    write_labels(tmp_path / "out.nii.gz", labels, source)
    assert read_labels(tmp_path / "out.nii.gz")[0].max() == 70_000


def damaged(folder: Path, name: str) -> Path:
    good = write(folder / "good.nii", np.eye(4)).read_bytes()
    path = folder / (f"{name}.nii.gz" if name in ("plain", "cut", "crc", "empty") else f"{name}.nii")
    packed = bytearray(gzip.compress(good))
    huge = nib.Nifti1Header()
    huge.set_data_shape((10_000, 10_000, 10_000))
    huge["vox_offset"] = 352
    flat = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.diag([1e-9, 1, 1, 1]))
    if name == "crc":
        packed[-6] ^= 1
    contents = {
        "empty": b"",
        "plain": good,
        "cut": bytes(packed[: len(packed) // 2]),
        "crc": bytes(packed),
        "magic": good[:344] + b"xxx\0" + good[348:],
        "header_only": good[:352],
        "huge": huge.binaryblock + b"\0\0\0\0",
        "flat": flat.to_bytes(),
        "zero": good[:42] + b"\0\0" + good[44:],
    }
    path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("empty", "corrupt_file"),
        ("plain", "corrupt_file"),
        ("cut", "corrupt_file"),
        ("crc", "corrupt_file"),
        ("magic", "corrupt_file"),
        ("header_only", "corrupt_file"),
        ("huge", "corrupt_file"),
        ("flat", "bad_geometry"),
        ("zero", "bad_header"),
    ],
)
def test_damage_gives_one_line_and_a_code(name: str, code: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, name)
    with pytest.raises(InputError) as caught:
        read_all(NiftiSource(path))
    assert caught.value.code == code
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_real_broken_files_have_exact_codes(shared: Path) -> None:
    expected = {
        "nifti1.hdr": "missing_file",
        "truncated.nii.gz": "corrupt_file",
        "gzip_crc_error.nii.gz": "corrupt_file",
        "bad_magic.nii": "corrupt_file",
        "zero_dim.nii": "bad_header",
        "header_only.nii": "corrupt_file",
        "plain_named_gz.nii.gz": "corrupt_file",
        "nan_affine.nii": "bad_geometry",
        "empty.nii.gz": "corrupt_file",
    }
    for name, code in expected.items():
        with pytest.raises(InputError) as caught:
            read_all(NiftiSource(shared / "data" / "broken" / name))
        assert caught.value.code == code, name


def test_real_files_in_all_axis_orders_are_one_head(shared: Path) -> None:
    from medmamba.preprocessing import canonical_axes
    from medmamba.source import PermutedSource

    heads = []
    for path in sorted((shared / "data" / "nifti_geometry").glob("[A-Z][A-Z][A-Z].nii.gz")):
        source = NiftiSource(path)
        heads.append(read_all(PermutedSource(source, *canonical_axes(source.grid))))
    assert len(heads) == 8
    for head in heads[1:]:
        assert np.array_equal(head.array, heads[0].array)
        assert head.grid.matches(heads[0].grid)


def test_find_lists_nifti_files_in_order(tmp_path: Path) -> None:
    for name in ("b.nii", "a.nii.gz", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find(tmp_path)] == ["a.nii.gz", "b.nii"]
