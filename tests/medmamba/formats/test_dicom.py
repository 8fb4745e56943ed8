"""Series in: geometry, values, every damage under its own code, and the real files."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
)

from medmamba.errors import InputError
from medmamba.formats import dicom_files, dicom_frames
from medmamba.formats.dicom import DicomSource, images, knows, parts
from medmamba.formats.dicom_pixels import codestream_shape
from medmamba.formats.dicom_stack import LPS_TO_RAS, stack
from medmamba.formats.nifti import NiftiSource
from medmamba.source import read_all
from medmamba.windows import Window
from tests.medmamba.formats.dicom_maker import (
    ORIGIN,
    PIXEL,
    STEP,
    dataset,
    multiframe,
    put_pixels,
    save,
    series,
    slice_of,
    values,
    zipped,
)

HU = -1024  # the intercept that the maker writes


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_all(DicomSource(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


def test_a_series_is_sorted_by_position_whatever_its_names(tmp_path: Path) -> None:
    source = DicomSource(save(tmp_path / "s", series(20)))
    assert np.array_equal(read_all(source).array[0], values(20).astype(np.int32) + HU)
    assert source.grid.spacing == (STEP, *PIXEL)
    assert np.allclose(source.grid.affine[:, 3], (-ORIGIN[0], -ORIGIN[1], ORIGIN[2], 1))  # LPS to RAS
    assert source.notes == ()


def test_instance_numbers_that_run_downwards_do_not_turn_the_volume(tmp_path: Path) -> None:
    slices = series(5)
    for i, data in enumerate(slices):
        data.InstanceNumber = 5 - i
        data.SOPInstanceUID = f"1.9.{i}"
    assert np.array_equal(read_all(DicomSource(save(tmp_path, slices))).array[0], values(5).astype(np.int32) + HU)


def test_a_window_is_a_slice_of_the_whole_and_decodes_only_its_own_slices(tmp_path: Path) -> None:
    folder = save(tmp_path, series(6))
    whole = read_all(DicomSource(folder)).array
    source = DicomSource(folder)
    window = Window(start=(2, 1, 3), size=(3, 4, 5))
    part = source.read(window)
    assert np.array_equal(part.array, whole[(slice(None), *window.slices)])
    assert part.grid == source.grid.crop(window.start, window.size)
    assert source._present[0].tolist() == [False, False, True, True, True, False]
    source.close()
    assert np.array_equal(source.read(window).array, part.array)


@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0, 30), st.floats(0.3, 8), st.floats(0.2, 3), st.booleans())
def test_the_affine_puts_every_slice_where_its_header_says(
    seed: int, count: int, lean: float, step: float, pixel: float, aside: bool
) -> None:
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    row, column = turn[:, 0], turn[:, 1]
    normal = np.cross(row, column)
    away = normal * step + (row if aside else column) * step * np.tan(np.radians(lean))
    origin = rng.normal(size=3) * 100
    shuffled = rng.permutation(count)
    found = stack(
        "s",
        origin + shuffled[:, None] * away,
        np.tile(np.concatenate([row, column]), (count, 1)),
        (pixel, pixel * 1.5),
        thickness=None,
        numbers=list(range(count)),
    )
    assert [shuffled[i] for i in found.order[0]] == list(range(count))
    index = np.array([count - 1, 7, 3, 1.0])  # z, y, x
    point = origin + (count - 1) * away + 7 * pixel * column + 3 * 1.5 * pixel * row
    assert np.allclose((found.affine @ index)[:3], (LPS_TO_RAS @ [*point, 1])[:3], atol=1e-6)
    told = [float(m[1]) for n in found.notes if (m := re.search(r"lean ([\d.]+) degrees", n))]
    sideways = (count - 1) * step * np.tan(np.radians(lean))
    assert told == ([pytest.approx(lean, abs=0.01)] if sideways > 0.1 * pixel else [])


@given(st.integers(4, 30), st.data())
def test_any_missing_slice_is_named(count: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(1, count - 2))
    depth = np.delete(np.arange(count) * 2.5, gone)
    with pytest.raises(InputError) as caught:
        place(depth)
    assert caught.value.code == "missing_slice"
    assert f"after slice {gone}: {(gone - 1) * 2.5:.2f} mm to {(gone + 1) * 2.5:.2f} mm" in str(caught.value)
    assert "1 slices are missing" in str(caught.value)


def place(depth: np.ndarray, numbers: list[int | None] | None = None, **changes: Any) -> Any:
    positions = np.stack([np.zeros(len(depth)), np.zeros(len(depth)), depth], axis=1)
    asked = {"thickness": 2.5, "numbers": numbers or [None] * len(depth), **changes}
    return stack("s", positions, np.tile([1.0, 0, 0, 0, 1, 0], (len(depth), 1)), (1.0, 1.0), **asked)


def test_positions_written_with_one_decimal_are_even(tmp_path: Path) -> None:
    assert place(np.round(np.arange(40) * 0.625, 1)).affine[2, 0] == pytest.approx(0.625, rel=1e-2)


def test_time_points_are_volumes_and_copies_are_not() -> None:
    depth = np.tile(np.arange(4.0), 3)
    assert place(depth, numbers=list(range(12))).order.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    interleaved = np.repeat(np.arange(4.0), 3)
    assert place(interleaved, numbers=list(range(12))).order[0].tolist() == [0, 3, 6, 9]
    for numbers in ([None] * 12, [0] * 12, [*range(11), 10]):
        with pytest.raises(InputError) as caught:
            place(depth, numbers=numbers)
        assert caught.value.code == "duplicate_slice"


def cut(folder: Path, share: float = 0.5) -> Path:
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return folder


def test_the_four_damages_that_peers_read_in_silence(tmp_path: Path) -> None:
    """One slice gone, one twice, a leaning stack, a file cut: three codes refuse, the lean is kept and told."""
    gone = series(20)
    del gone[9]
    error = refusal(save(tmp_path / "gone", gone))
    assert error.code == "missing_slice"
    assert "after slice 9: 116.00 mm to 120.00 mm, usual step 2.000 mm" in str(error)

    twice = series(20)
    copy = slice_of(values(20)[9], 21, (ORIGIN[0], ORIGIN[1], ORIGIN[2] + 9 * STEP))
    assert refusal(save(tmp_path / "twice", [*twice, copy])).code == "duplicate_slice"
    assert refusal(save(tmp_path / "copied", [*twice, twice[9]])).code == "duplicate_slice"

    leaning = DicomSource(save(tmp_path / "leaning", series(20, lean=15)))
    assert [n.split(":")[0] for n in leaning.notes] == ["gantry_tilt"]
    assert "15.00 degrees" in leaning.notes[0]
    far = leaning.grid.affine @ [19, 0, 0, 1]
    assert far[1] == pytest.approx(-(ORIGIN[1] + 19 * STEP * np.tan(np.radians(15))), abs=1e-4)

    for share in (0, 0.1, 0.3, 0.5, 0.99):  # empty, before the mark, in the header, in the pixels
        assert refusal(cut(save(tmp_path / f"cut{share}", series(20)), share)).code == "corrupt_file"


def turned(slices: list[FileDataset]) -> list[FileDataset]:
    slices[2].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    return slices


def scout(slices: list[FileDataset]) -> list[FileDataset]:
    slices[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    return slices


def moved(slices: list[FileDataset], by: float) -> list[FileDataset]:
    slices[2].ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + 2 * STEP + by]
    return slices


def larger(slices: list[FileDataset]) -> list[FileDataset]:
    put_pixels(slices[1], values(1, 16, 16)[0])
    return slices


def stored_as(slices: list[FileDataset], syntax: UID) -> list[FileDataset]:
    for data in slices:
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = encapsulate([bytes(8)])
        data["PixelData"].VR = "OB"
    return slices


def second(slices: list[FileDataset]) -> list[FileDataset]:
    return [*slices, *series(3, uid="1.2.9")]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: turned(series(5)), "mixed_orientations"),
        (lambda: scout(series(5)), "localizer"),
        (lambda: moved(series(5), 0.7), "uneven_slices"),
        (lambda: larger(series(5)), "mixed_series"),
        (lambda: second(series(5)), "mixed_series"),
        (lambda: series(5, lean=60), "gantry_tilt"),
        (lambda: series(5, ImagePositionPatient=None), "bad_geometry"),
        (lambda: series(5, PixelSpacing=[0, 1]), "bad_geometry"),
        (lambda: series(5, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "bad_geometry"),
        (lambda: series(1, SliceThickness=None), "bad_geometry"),
        (lambda: series(5, Rows=60_000, Columns=60_000), "too_large"),
        (lambda: series(5, NumberOfFrames=10**6), "corrupt_file"),
        (lambda: series(5, BitsStored=40), "bad_header"),
        (lambda: series(5, PhotometricInterpretation="RGB", SamplesPerPixel=3), "unsupported_format"),
        (lambda: [*series(4), *series(5, Units="BQML")[4:]], "mixed_series"),
        (lambda: [*series(4), *series(5, FrameOfReferenceUID="1.2.7")[4:]], "mixed_series"),
        (lambda: series(3, SOPClassUID=RTDoseStorage), "unsupported_format"),
        (lambda: stored_as(series(3), MPEG2MPML), "unsupported_format"),
    ],
)
def test_every_fault_has_its_code(make: Callable[[], list[FileDataset]], code: str, tmp_path: Path) -> None:
    assert refusal(save(tmp_path, make())).code == code


def test_two_or_more_slices_missing_are_counted() -> None:
    with pytest.raises(InputError, match="3 slices are missing, first after slice 2"):
        place(np.delete(np.arange(12) * 2.0, [2, 6, 7]))


def test_an_end_that_may_be_missing_is_told(tmp_path: Path) -> None:
    """Nothing in the positions shows that the first slice, or every second one, is not there."""
    first_gone, half = series(6)[1:], series(8)[::2]
    for name, slices in (("first", first_gone), ("half", half)):
        (note,) = DicomSource(save(tmp_path / name, slices)).notes
        assert "look whether the series is whole" in note
    assert DicomSource(save(tmp_path / "whole", series(6))).notes == ()


def test_values_signed_unsigned_and_with_bits_above_them(tmp_path: Path) -> None:
    stored = np.array([[0, 1], [2047, 4095]], np.uint16)
    junk = stored | np.uint16(0x7000)  # an overlay in the upper four bits
    slices = series(2, array=np.stack([junk, junk]), BitsStored=12, HighBit=11, RescaleIntercept=0)
    assert np.array_equal(read_all(DicomSource(save(tmp_path / "u", slices))).array[0, 0], stored)
    negative = np.array([[-1, -2048], [5, 2047]], np.int16)
    masked = (negative & 0x0FFF).astype(np.int16)  # the sign bit stands at bit 11
    slices = series(2, array=np.stack([masked, masked]), BitsStored=12, HighBit=11, RescaleIntercept=0)
    source = DicomSource(save(tmp_path / "s", slices))
    assert np.array_equal(read_all(source).array[0, 1], negative)
    assert source.dtype == np.int16


def test_every_pet_slice_has_its_own_slope(tmp_path: Path) -> None:
    slices = series(3, Units="BQML", SOPClassUID=PositronEmissionTomographyImageStorage, RescaleIntercept=0)
    for i, data in enumerate(slices):
        data.RescaleSlope = 0.5 + i
    source = DicomSource(save(tmp_path, slices))
    expected = values(3) * np.array([0.5, 1.5, 2.5])[:, None, None]
    np.testing.assert_allclose(read_all(source).array[0], expected, rtol=1e-6)
    assert source.dtype == np.float32
    assert any("BQML" in note for note in source.notes)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=["rle", "jpeg2000", "jpegls"])
def test_compressed_slices(syntax: UID, tmp_path: Path) -> None:
    slices = series(3, array=values(3, 80, 64))
    for data in slices:
        data.compress(syntax, generate_instance_uid=False)
    folder = save(tmp_path / syntax, slices)
    assert np.array_equal(read_all(DicomSource(folder)).array[0], values(3, 80, 64).astype(np.int32) + HU)
    for share, code in ((0.95, "corrupt_file"), (0.6, "corrupt_file")):
        assert refusal(cut_first(folder, share)).code == code


def cut_first(folder: Path, share: float) -> Path:
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return folder


def test_a_compressed_stream_that_claims_another_size_is_not_decoded(tmp_path: Path) -> None:
    slices = series(2, array=values(2, 80, 64))
    for data in slices:
        data.compress(JPEG2000Lossless, generate_instance_uid=False)
        data.PixelData = data.PixelData.replace(struct.pack(">2I", 64, 80), struct.pack(">2I", 60_000, 60_000))
    assert refusal(save(tmp_path, slices)).code == "bad_header"


def test_run_lengths_that_claim_more_than_they_can_hold_take_no_memory(tmp_path: Path) -> None:
    slices = series(2, array=values(2, 80, 64))
    for data in slices:
        data.compress(RLELossless, generate_instance_uid=False)
        data.Rows, data.Columns = 20_000, 20_000
    assert refusal(save(tmp_path, slices)).code == "corrupt_file"


def test_what_a_stream_claims_in_its_first_bytes() -> None:
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xf7\x00\x0b\x10" + struct.pack(">HH", 3, 5) + b"\x01" * 8
    assert codestream_shape(jpeg) == (3, 5)
    assert codestream_shape(b"\x00" * 64) is None
    assert codestream_shape(b"\xff\xd8") is None


def test_a_multi_frame_file_is_read_by_its_own_positions(tmp_path: Path) -> None:
    array = values(4).astype(np.uint16)
    order = [2, 0, 3, 1]
    data = multiframe(array[order], [100 + STEP * i for i in order])
    source = DicomSource(save(tmp_path, [data]))
    assert np.array_equal(read_all(source).array[0], array.astype(np.float32) * 2 + 10)
    assert source.grid.spacing == (STEP, *PIXEL)


@pytest.mark.parametrize("files", [1, 3])
def test_a_time_series_in_one_file_or_several(files: int, tmp_path: Path) -> None:
    array = values(12).astype(np.uint16)
    depths = [100 + STEP * (i % 4) for i in range(12)]
    if files == 1:
        slices = [multiframe(array, depths, [i // 4 + 1 for i in range(12)])]
    else:
        slices = [multiframe(array[4 * t : 4 * t + 4], depths[:4], [t + 1] * 4, number=t + 1) for t in range(3)]
    image = read_all(DicomSource(save(tmp_path, slices)))
    assert np.array_equal(image.array, array.reshape(3, 4, 12, 10) * 2.0 + 10)
    assert image.channels == ("0", "1", "2")


def test_frames_without_positions_are_refused(tmp_path: Path) -> None:
    data = multiframe(values(4).astype(np.uint16), [0, 1, 2, 3])
    del data.PerFrameFunctionalGroupsSequence
    assert refusal(save(tmp_path, [data])).code == "bad_geometry"


def test_a_deflated_file_is_not_unpacked(tmp_path: Path) -> None:
    slices = series(2)
    for data in slices:
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert refusal(save(tmp_path, slices)).code == "unsupported_format"


def study(root: Path) -> Path:
    """Two series and a dose report in one folder, one series deeper, a text file, a picture without position."""
    save(root, [*series(5, uid="1.2.1"), *series(4, uid="1.2.2")])
    save(root / "deep" / "er", series(3, uid="1.2.3"))
    save(root, [dataset("1.2.840.10008.5.1.4.1.1.88.67", "1.2.4.1", "1.2.4")], "report{}".format)
    shot = slice_of(values(1)[0], 1, (0, 0, 0), series="1.2.5", ImagePositionPatient=None)
    shot.SOPClassUID = SecondaryCaptureImageStorage
    save(root, [shot], "shot{}".format)
    (root / "README").write_text("no image")
    return root


def test_series_in_one_folder_have_addresses_of_their_own(tmp_path: Path) -> None:
    root = study(tmp_path / "study")
    assert images(root) == (root / "series=1.2.1", root / "series=1.2.2")
    assert images(root / "deep" / "er") == (root / "deep" / "er",)
    assert DicomSource(root / "series=1.2.2").grid.shape[0] == 4
    assert len(parts(root / "series=1.2.1")) == 5
    assert DicomSource(root / "series=1.2.1").notes == (
        "2 DICOM objects that are no slices beside the series passed over",
    )
    assert DicomSource(root / "deep").grid.shape[0] == 3  # a folder of folders
    assert refusal(root).code == "mixed_series"
    assert knows(root)
    assert not knows(root / "README")
    (root / "deep" / "DICOMDIR").write_bytes(next((root / "deep" / "er").iterdir()).read_bytes())  # a table of contents
    assert images(root / "deep") == ()
    assert DicomSource(root / "deep").grid.shape[0] == 3
    (root / "text").mkdir()
    assert not knows(root / "text")


def test_a_zip_is_read_without_unpacking_it(tmp_path: Path) -> None:
    path = zipped(study(tmp_path / "study"), tmp_path / "study.zip")
    assert images(path) == tuple(path / f"series=1.2.{i}" for i in (1, 2, 3))
    before = sorted(tmp_path.rglob("*"))
    source = DicomSource(path / "series=1.2.1")
    assert np.array_equal(read_all(source).array[0], values(5).astype(np.int32) + HU)
    assert sorted(tmp_path.rglob("*")) == before
    assert parts(path / "series=1.2.1") == (path,)


def test_member_names_that_lead_out_of_the_zip_lead_nowhere(tmp_path: Path) -> None:
    folder = save(tmp_path / "s", series(3))
    with zipfile.ZipFile(
        tmp_path / "in" / "evil.zip" if (tmp_path / "in").mkdir() else tmp_path / "in/evil.zip", "w"
    ) as z:
        for i, file in enumerate(sorted(folder.iterdir())):
            z.write(file, ("../../out", "/tmp/out", "..\\out")[i] + f"{i}.dcm")
    before = sorted(tmp_path.rglob("*"))
    assert read_all(DicomSource(tmp_path / "in" / "evil.zip")).array.shape == (1, 3, 12, 10)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_and_lying_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = zipped(save(tmp_path / "s", series(3)), tmp_path / "good.zip").read_bytes()
    path = tmp_path / "x.zip"
    path.write_bytes(good[: len(good) // 2])
    assert refusal(path).code == "corrupt_file"
    assert images(path) == (path,)
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    assert refusal(path).code == "unsupported_format"
    assert images(path) == ()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:  # bzip2 packs zeros far below deflate's limit
        archive.writestr("IM1.dcm", bytes(20_000_000))
    assert refusal(path).code == "corrupt_file"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("IM1.dcm", bytes(128) + b"DICM" + bytes(20_000_000))
    assert refusal(path).code == "corrupt_file"
    path.write_bytes(good)
    monkeypatch.setattr(dicom_files, "MOST_MEMBERS", 2)
    assert refusal(path).code == "too_large"


def test_a_header_is_read_without_the_rest_of_its_member(tmp_path: Path) -> None:
    """50 MB of zeros behind the pixels that an honest header claims are never unpacked."""
    import tracemalloc

    data = series(1)[0]
    data.PixelData = bytes(50_000_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        save(tmp_path / "s", [data])
        archive.write(next((tmp_path / "s").iterdir()), "IM1")
    del data
    tracemalloc.start()
    source = DicomSource(tmp_path / "bomb.zip")  # more pixels than claimed are padding: allowed, never read
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert source.grid.shape == (1, 12, 10)


def test_a_disk_that_stutters_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO and the like may pass: they go to the caller, who tries again."""
    folder = save(tmp_path, series(3))

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(dicom_frames, "read_partial", fails)
    with pytest.raises(OSError, match="input/output"):
        DicomSource(folder)


def test_missing_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "none").code == "missing_file"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").code == "unsupported_format"
    save(tmp_path / "s", series(3))
    assert refusal(tmp_path / "s" / "series=9.9").code == "unsupported_format"

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "closed")

    monkeypatch.setattr(dicom_frames, "read_partial", closed)
    assert refusal(tmp_path / "s").code == "permission"


def test_a_file_that_is_no_dicom_says_so(tmp_path: Path) -> None:
    save(tmp_path, series(3))
    (tmp_path / "bad.dcm").write_bytes(b"x" * 500)
    assert refusal(tmp_path).code == "corrupt_file"  # it carries the name of a slice: not passed over in silence
    assert "bad.dcm" in str(refusal(tmp_path))


def test_real_series(shared: Path) -> None:
    folder = shared / "data" / "dicom"
    expected = {
        "tiny_ct_series": ((5, 16, 16), 1, (2.5, 0.488281, 0.488281)),
        "ge_ax_fmri": ((10, 64, 64), 5, (3.0, 3.75, 3.75)),
        "siemens_xa10": ((6, 64, 64), 4, (2.4, 3.375, 3.375)),
        "eCT_Supplemental.dcm": ((2, 512, 512), 1, (10.0, 0.388672, 0.388672)),
    }
    for name, (shape, volumes, spacing) in expected.items():
        source = DicomSource(folder / name)
        assert (source.grid.shape, len(source.channels)) == (shape, volumes), name
        assert source.grid.spacing == pytest.approx(spacing, abs=1e-4), name


def test_a_real_enhanced_series_equals_its_reference_nifti(shared: Path) -> None:
    """Truth: what dcm2niix wrote of the same files; the axes run otherwise, the voxels in space not."""
    from medmamba.preprocessing import canonical_axes
    from medmamba.source import PermutedSource

    folder = shared / "data" / "dicom"
    ours, truth = DicomSource(folder / "siemens_xa10"), NiftiSource(folder / "siemens_xa10_reference.nii")
    a = read_all(PermutedSource(ours, *canonical_axes(ours.grid)))
    b = read_all(PermutedSource(truth, *canonical_axes(truth.grid)))
    assert np.array_equal(a.array, b.array)
    assert a.grid.matches(b.grid, tolerance=1e-2)


def test_real_files_in_six_encodings_hold_the_same_pixels(shared: Path) -> None:
    files = sorted((shared / "data" / "dicom").glob("MR_small*.dcm"))
    arrays = [read_all(DicomSource(path)).array for path in files]
    assert len(arrays) == 6
    assert all(np.array_equal(arrays[0], other) for other in arrays)


def test_real_files_that_must_be_refused(shared: Path) -> None:
    expected = {
        "dicom/ge_localizer": "mixed_orientations",
        "dicom/emri_small.dcm": "bad_geometry",
        "dicom/rtdose.dcm": "unsupported_format",
        "dicom/rtstruct.dcm": "corrupt_file",
        "dicom/rtplan.dcm": "unsupported_format",
        "dicom/liver.dcm": "unsupported_format",
        "dicom/examples_palette.dcm": "unsupported_format",
        "dicom/waveform_ecg.dcm": "unsupported_format",
        "dicom/parametric_map_float.dcm": "unsupported_format",
        "broken/ExplVR_LitEndNoMeta.dcm": "corrupt_file",
        "broken/MR_truncated.dcm": "corrupt_file",
        "broken/badVR.dcm": "unsupported_format",
        "broken/emri_small_jpeg_2k_lossless_too_short.dcm": "corrupt_file",
        "broken/meta_missing_tsyntax.dcm": "corrupt_file",
        "broken/no_meta.dcm": "corrupt_file",
        "broken/rtplan_truncated.dcm": "unsupported_format",
    }
    assert {name: refusal(shared / "data" / name).code for name in expected} == expected


def test_real_files_that_others_could_not_read(shared: Path) -> None:
    """A JPEG 2000 stream whose sign differs from the header, and JPEG Lossless beside a wrong sequence length."""
    expected = {"J2K_pixelrep_mismatch.dcm": (-2000, 1896), "bad_sequence.dcm": (-1011, 1243)}
    for name, (low, high) in expected.items():
        array = read_all(DicomSource(shared / "data" / "broken" / name)).array
        assert (array.min(), array.max()) == (low, high), name
