"""Data sets of others from folder to results, named as their owners look for them; a second run finds nothing due."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from flows import batch
from flows.batch import ASIDE, WELL, run_batch
from flows.work import run_in_order
from medmamba.bundle import Bundle
from medmamba.errors import InputError
from medmamba.formats.nifti import read_labels
from pipelines.cases import cohort
from pipelines.cases.archive import cases_of
from pipelines.cases.case import Case
from pipelines.cases.contents import content_hash
from pipelines.cases.formats import open_source
from pipelines.cases.manifest import read_dataset
from pipelines.layouts import bids
from pipelines.report import Report
from pipelines.scoring.evaluate import match, references
from pipelines.serving.predict import Predictor, predict
from tests.ways.tiny import make_bundle, write_volume


@pytest.fixture(autouse=True)
def mlflow_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)


def run(source: Path, bundle: Bundle, output: Path, said: list[str]) -> int:
    return run_batch(
        input=source, bundle=str(bundle.folder), output=output, settle=0, echo=said.append, runner=run_in_order
    )


def in_bids(place: Path) -> Path:
    """Two subjects, one of them in sessions, with manual labels."""
    for number, folder in enumerate(("sub-01/anat", "sub-02/ses-a/anat", "sub-02/ses-b/anat")):
        name = "_".join(Path(folder).parent.parts)
        write_volume(place / folder / f"{name}_T1w.nii.gz", number)
        labels = np.zeros((12, 12, 12), np.uint8)
        labels[2:9, 2:9, 2:9] = 1 + number % 2
        derived = place / "derivatives" / "manual" / folder / f"{name}_dseg.nii.gz"
        derived.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), derived)
    (place / "dataset_description.json").write_text(json.dumps({"Name": "heads", "BIDSVersion": "1.9.0"}))
    return place


def test_bids_goes_in_and_a_derivative_comes_out(tmp_path: Path) -> None:
    place, bundle = in_bids(tmp_path / "heads"), make_bundle(tmp_path / "bundle", roles=("t1",), name="grey-matter")
    output, said = place / "derivatives", list[str]()
    assert run(place, bundle, output, said) == WELL, said
    folder = output / bundle.title
    stems = ["sub-01/anat/sub-01", "sub-02/ses-a/anat/sub-02_ses-a", "sub-02/ses-b/anat/sub-02_ses-b"]
    made = [folder / f"{stem}_space-orig_desc-greymatter_dseg.nii.gz" for stem in stems]
    assert sorted(folder.rglob("*_dseg.nii.gz")) == made
    sidecar = json.loads(made[1].with_name(made[1].name.replace(".nii.gz", ".json")).read_text())
    source = "bids:raw:sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz"
    assert (sidecar["Sources"], sidecar["SpatialReference"]) == ([source], source)
    described = json.loads((folder / "dataset_description.json").read_text())
    raw = (folder / described["DatasetLinks"]["raw"]).resolve()
    assert raw == place.resolve()
    assert "report.html" in (folder / ".bidsignore").read_text().split()
    assert (raw / source.removeprefix("bids:raw:")).is_file()
    assert "data:image/jpeg;base64," in (folder / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(place, bundle, output, said) == WELL
    assert "3 cases: nothing due, 3 done before" in said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    made[0].unlink()
    assert run(place, bundle, output, said) == WELL
    assert made[0].exists()
    labels = {str(c.label.parent) for c in cohort.read(place, ["t1"], labels=(1, 2))}  # not those we predicted
    assert all("manual" in label for label in labels)
    assert [found for _, _, found in match(references(place), folder)] == made


def test_a_derivative_of_ours_keeps_the_names_of_its_inputs() -> None:
    assert bids.original("sub-01_ses-2_space-orig_desc-x") == "sub-01_ses-2"
    assert bids.original("case_desc-x") == "case_desc-x"
    assert bids.source_uri(Path("/a/case.nii.gz"), "{id}_{suffix}") == {}


def in_nnunet(place: Path, *, channels: int = 1) -> Path:
    names = {str(i): f"c{i}" for i in range(channels)}
    labels = {"background": 0, "one": 1, "two": 2}
    place.mkdir()
    values = {"channel_names": names, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
    (place / "dataset.json").write_text(json.dumps(values))
    return place


def test_nnunet_finds_results_under_the_names_it_gives(tmp_path: Path) -> None:
    place, bundle, said = in_nnunet(tmp_path / "Dataset001_X"), make_bundle(tmp_path / "bundle"), list[str]()
    for name in ("liver_001", "liver_002"):
        write_volume(place / "imagesTs" / f"{name}_0000.nii.gz")
    write_volume(place / "imagesTr" / "liver_003_0000.nii.gz")
    for number, source in enumerate((place / "imagesTs", place)):
        folder = tmp_path / f"out{number}" / bundle.title
        assert run(source, bundle, folder.parent, said) == WELL, said
        assert len(list(folder.glob("liver_00?.nii.gz"))) == 2 + number == len(list(folder.glob("*.nii.gz")))
        report = Report.load(folder / "liver_001.json")
        assert report is not None
        assert list(report.outputs) == ["liver_001.nii.gz", "liver_001.png"]
        assert run(source, bundle, folder.parent, said) == WELL
        assert any("nothing due" in line for line in said)


def four_d(path: Path, volumes: int = 2) -> Path:
    """Noise in another mood in each volume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 100, (12, 12, 12)) * (v + 1) for v in range(volumes)]
    nib.save(nib.Nifti1Image(np.stack(values, -1).astype(np.int16), np.eye(4)), path)
    return path


def in_decathlon(place: Path, *, channels: int = 2) -> Path:
    """The Medical Segmentation Decathlon's layout: one 4D file a case."""
    names = ["FLAIR", "T1w", "t1gd", "T2w"][:channels]
    for case in ("BRATS_001", "BRATS_002"):
        four_d(place / "imagesTr" / f"{case}.nii.gz", channels)
        labels = np.zeros((12, 12, 12), np.uint8)
        labels[3:8, 3:8, 3:8] = 1
        (place / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), place / "labelsTr" / f"{case}.nii.gz")
    four_d(place / "imagesTs" / "BRATS_003.nii.gz", channels)
    values = {
        "modality": {str(i): name for i, name in enumerate(names)},
        "labels": {"0": "background", "1": "edema"},
        "training": [
            {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in ("BRATS_001", "BRATS_002")
        ],
        "test": ["./imagesTs/BRATS_003.nii.gz"],
    }
    (place / "dataset.json").write_text(json.dumps(values))
    return place


def test_the_volumes_of_a_4d_file_are_the_channels_of_its_case(tmp_path: Path) -> None:
    place = in_decathlon(tmp_path / "Task01")
    dataset = read_dataset(place)
    assert dataset is not None
    assert dataset.roles == ("FLAIR", "T1w")
    known = cohort.read(place, ["flair", "t1"], labels=(1,))
    assert [c.case.id for c in known] == ["BRATS_001", "BRATS_002"]
    whole = nib.load(place / "imagesTr" / "BRATS_001.nii.gz").get_fdata()
    for number, role in enumerate(("flair", "t1")):
        source = open_source(known[0].case.files[role])
        assert len(source.channels) == 1
        found = source.read(source_window(source)).array[0]
        np.testing.assert_array_equal(found, whole[..., number].T)
        source.close()
    assert len({content_hash(path) for path in known[0].case.files.values()}) == 2
    bundle, said = make_bundle(tmp_path / "bundle", roles=("flair", "t1")), list[str]()
    assert run(place, bundle, tmp_path / "out", said) == WELL, said
    first = (tmp_path / "out" / bundle.title / "BRATS_003_dseg.nii.gz").read_bytes()
    for index, source in enumerate(
        (place / "imagesTs", place / "imagesTs" / "BRATS_003.nii.gz")
    ):  # a plain folder, a file
        cases = cases_of([source], ("flair", "t1"), output=tmp_path / "x")
        report = predict(Predictor.load(bundle, device="cpu"), cases[0], tmp_path / f"plain{index}")
        assert report.inputs["t1"]["path"].endswith("BRATS_003.nii.gz/volume=1")
        assert (tmp_path / f"plain{index}" / bundle.title / "BRATS_003_dseg.nii.gz").read_bytes() == first


def source_window(source: object):  # type: ignore[no-untyped-def]
    from medmamba.windows import Window

    return Window.whole(source.grid.shape)  # type: ignore[attr-defined]


def test_a_4d_file_that_fits_no_bundle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path, bundle, said = four_d(tmp_path / "in" / "a.nii.gz", 3), make_bundle(tmp_path / "bundle"), list[str]()
    assert run(tmp_path / "in", bundle, tmp_path / "out", said) == ASIDE
    record = json.loads((tmp_path / "out" / bundle.title / "set_aside" / "a.json").read_text())
    assert record["code"] == "wrong_channels"
    assert "/volume=0" in record["message"]
    chosen = Case(id="a", files={"ct": path / "volume=2"})
    report = predict(Predictor.load(bundle, device="cpu"), chosen, tmp_path / "one")
    assert read_labels(tmp_path / "one" / bundle.title / "a_dseg.nii.gz")[0].shape == (12, 12, 12)
    assert report.status == "done"
    for name, code in {"volume=3": "wrong_channels", "volume=x": "unsupported_format"}.items():
        with pytest.raises(InputError) as caught:
            open_source(path / name)
        assert caught.value.code == code


def test_nnunet_reads_a_4d_file_for_all_channels(tmp_path: Path) -> None:
    place = in_nnunet(tmp_path / "Dataset002_Y", channels=2)
    four_d(place / "imagesTs" / "a_0000.nii.gz")
    shutil.copyfile(place / "imagesTs" / "a_0000.nii.gz", place / "imagesTs" / "b.nii.gz")  # not of the data set
    dataset = read_dataset(place)
    assert dataset is not None
    assert [Path(dataset.rows[0][role]).name for role in ("c0", "c1")] == ["volume=0", "volume=1"]
