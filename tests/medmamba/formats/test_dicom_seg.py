"""Labels out as DICOM SEG and back: lossless, the same bytes again, referencing what they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import UID, RLELossless

from medmamba.errors import ConfigError, InputError
from medmamba.formats import dicom_seg
from medmamba.formats.dicom import DicomSource
from medmamba.formats.dicom_seg import KINDS, Segments, read_seg, uid, write_seg
from medmamba.grid import Grid
from tests.medmamba.formats.dicom_maker import FRAME_OF_REFERENCE, SERIES, STEP, STUDY, multiframe, save, series, values

LIVER = {"type": ("SCT", "10200004", "Liver")}
TUMOUR = {
    "type": ("SCT", "108369006", "Neoplasm"),
    "category": ("SCT", "49755003", "Morphologically Altered Structure"),
}
SEGMENTS = Segments(
    names={0: "background", 1: "liver", 7: "tumour", 300: "something"},
    maker="tiny",
    version="0123456789abcdef",
    codes={1: LIVER, 7: TUMOUR},
    colours={1: (1.0, 0.0, 0.0)},
)


def labelled(source: DicomSource, seed: int = 0) -> np.ndarray:
    """Labels in the middle slices only: the first and last are empty."""
    labels = np.zeros(source.grid.shape, np.int32)
    labels[1:-1] = np.random.default_rng(seed).choice([0, 1, 7, 300], labels[1:-1].shape)
    return labels


def oblique(count: int) -> list[FileDataset]:
    slices = series(count)
    c, s = np.cos(0.4), np.sin(0.4)
    for i, data in enumerate(slices):
        data.ImageOrientationPatient = [round(c, 10), round(s, 10), 0, 0, 0, -1]
        data.ImagePositionPatient = [f"{v:.8f}" for v in (np.array([-s, c, 0]) * STEP * i)]
    return slices


STACKS: dict[str, Callable[[], list[FileDataset]]] = {
    "straight": lambda: series(5),
    "tilted": lambda: series(5, lean=15),
    "oblique": lambda: oblique(5),
    "one slice": lambda: series(1),
    "multi-frame": lambda: [multiframe(values(4).astype(np.uint16)[[2, 0, 3, 1]], [104.0, 100.0, 106.0, 102.0])],
    "time series": lambda: [multiframe(values(8).astype(np.uint16), [100 + STEP * (i % 4) for i in range(8)])],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STACKS)
def test_labels_and_geometry_come_back(name: str, kind: str, tmp_path: Path) -> None:
    source = DicomSource(save(tmp_path / "s", STACKS[name]()))
    labels = labelled(source) if source.grid.shape[0] > 1 else np.full(source.grid.shape, 7, np.int32)
    write_seg(tmp_path / "a.dcm", labels, source, SEGMENTS, key="k", kind=kind)
    again, _ = read_seg(tmp_path / "a.dcm", source.grid)
    assert np.array_equal(again, labels)
    if kind == "labelmap":  # every slice is in it: the file alone says where it lies
        alone, grid = read_seg(tmp_path / "a.dcm")
        assert np.array_equal(alone, labels)
        assert grid.matches(source.grid)


def test_another_reader_sees_the_same(tmp_path: Path) -> None:
    """Truth: highdicom's own reader, which makes a volume of the file by its positions."""
    from highdicom.seg import segread

    source = DicomSource(save(tmp_path / "s", series(5)))
    labels = labelled(source)
    write_seg(tmp_path / "a.dcm", labels, source, SEGMENTS, key="k")
    volume = segread(tmp_path / "a.dcm").get_volume(combine_segments=True)
    corner = volume.affine @ [0, 0, 0, 1]
    turned = volume.array if np.allclose(corner[:3], (*source.frames[0][0].position,)) else volume.array[::-1]
    assert np.array_equal(turned, labels)
    assert volume.spacing == pytest.approx(source.grid.spacing)


@settings(max_examples=8)  # each writes and reads a series and a file
@given(st.integers(0, 10**6))
def test_any_labels_come_back(seed: int) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        source = DicomSource(save(Path(folder) / "s", series(int(rng.integers(2, 5)), lean=float(rng.integers(0, 20)))))
        labels = rng.choice([0, 1, 7, 300], source.grid.shape, p=rng.dirichlet([1] * 4)).astype(np.int32)
        write_seg(Path(folder) / "a.dcm", labels, source, SEGMENTS, key=str(seed))
        assert np.array_equal(read_seg(Path(folder) / "a.dcm")[0], labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_case_gives_the_same_bytes_and_another_key_other_identifiers(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "s", series(3))
    labels = labelled(DicomSource(folder))
    for name, key in (("a", "k"), ("b", "k"), ("c", "other")):
        write_seg(tmp_path / name, labels, DicomSource(folder), SEGMENTS, key=key, kind=kind)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    first, other = dcmread(tmp_path / "a"), dcmread(tmp_path / "c")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert first[keyword].value != other[keyword].value
        assert UID(first[keyword].value).is_valid
    assert first.StudyInstanceUID == other.StudyInstanceUID == STUDY


def test_it_says_whose_where_when_and_what(tmp_path: Path) -> None:
    source = DicomSource(save(tmp_path / "s", series(4)))
    write_seg(tmp_path / "a.dcm", labelled(source), source, SEGMENTS, key="k")
    seg = dcmread(tmp_path / "a.dcm")
    assert seg.file_meta.TransferSyntaxUID == RLELossless
    assert (seg.SegmentationType, seg.Modality, seg.PatientID) == ("LABELMAP", "SEG", "P1")
    assert (seg.FrameOfReferenceUID, seg.StudyDate, seg.ContentDate) == (FRAME_OF_REFERENCE, "20240102", "20240102")
    named = [i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert sorted(named) == [f"{SERIES}.{i}" for i in (1, 2, 3, 4)]
    for frame in seg.PerFrameFunctionalGroupsSequence:  # each frame names the slice that lies where it lies
        z = (float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) - 100) / STEP
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert image.ReferencedSOPInstanceUID == f"{SERIES}.{round(z) + 1}"
    told = {
        s.SegmentLabel: (
            s.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator,
            s.SegmentedPropertyTypeCodeSequence[0].CodeValue,
            s.SegmentedPropertyCategoryCodeSequence[0].CodeValue,
        )
        for s in seg.SegmentSequence
        if s.SegmentNumber
    }
    assert told == {
        "liver": ("SCT", "10200004", "123037004"),
        "tumour": ("SCT", "108369006", "49755003"),
        "something": ("99MEDMAMBA", "LABEL-300", "123037004"),
    }


def test_a_study_without_dates_and_with_odd_words_gets_one_all_the_same(tmp_path: Path) -> None:
    slices = series(3, StudyDate=None, StudyTime="", PatientSex="UNKNOWN", AccessionNumber=None, PatientName=None)
    source = DicomSource(save(tmp_path / "s", slices))
    write_seg(tmp_path / "a.dcm", labelled(source), source, SEGMENTS, key="k")
    assert dcmread(tmp_path / "a.dcm").ContentDate == "19000101"


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    bare = DicomSource(save(tmp_path / "bare", series(3, FrameOfReferenceUID=None)))
    with pytest.raises(InputError, match="Frame Of Reference") as caught:
        write_seg(tmp_path / "a.dcm", labelled(bare), bare, SEGMENTS, key="k")
    assert caught.value.code == "bad_header"
    source = DicomSource(save(tmp_path / "s", series(3)))
    with pytest.raises(ConfigError, match="known: labelmap, binary"):
        write_seg(tmp_path / "a.dcm", labelled(source), source, SEGMENTS, key="k", kind="fractional")
    assert not (tmp_path / "a.dcm").exists()


def test_what_is_read_back_otherwise_never_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DicomSource(save(tmp_path / "s", series(3)))
    monkeypatch.setattr(dicom_seg, "_value", lambda segment: 2)
    with pytest.raises(InputError) as caught:
        write_seg(tmp_path / "a.dcm", labelled(source), source, SEGMENTS, key="k")
    assert caught.value.code == "output_mismatch"
    assert not (tmp_path / "a.dcm").exists()


def test_a_seg_does_not_lie_on_any_grid(tmp_path: Path) -> None:
    source = DicomSource(save(tmp_path / "s", series(3)))
    write_seg(tmp_path / "a.dcm", labelled(source), source, SEGMENTS, key="k")
    shifted = source.grid.affine.copy()
    shifted[0, 3] += 1
    with pytest.raises(InputError) as caught:
        read_seg(tmp_path / "a.dcm", Grid(source.grid.shape, shifted, source.grid.frame))
    assert caught.value.code == "bad_geometry"


def test_identifiers_are_made_of_all_parts() -> None:
    assert len({uid("a", "b"), uid("ab"), uid("b", "a"), uid("a", "b", "")}) == 4
    assert UID(uid("a")).is_valid


def test_a_seg_made_by_others_is_read(shared: Path) -> None:
    labels, grid = read_seg(shared / "data" / "dicom" / "liver.dcm")
    frames = dcmread(shared / "data" / "dicom" / "liver.dcm").pixel_array
    assert sorted(int(v) for v in labels.sum((1, 2))) == sorted(int(v) for v in frames.sum((1, 2)))
    assert grid.shape == (3, 512, 512)
