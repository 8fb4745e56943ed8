"""Data sets in the layouts of others, read where they lie: the same cohort in each gives the same cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medmamba.errors import ConfigError
from pipelines.cases import archive, cohort
from pipelines.cases.manifest import layout_of, read_dataset, read_manifest
from pipelines.layouts import bids, nnunet
from pipelines.scoring.evaluate import references
from tests.pipelines.cohort_maker import LABELS, write_cohort

CASES = ("c0", "c1", "c2", "c3")
FOLDS = [{"train": ["c2", "c3"], "val": ["c0", "c1"]}, {"train": ["c0", "c1"], "val": ["c2", "c3"]}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes c0..c3 with labels 3 and 7, and their table."""
    return write_cohort(tmp_path_factory.mktemp("plain"), cases=4, size=8)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def in_nnunet(plain: Path, root: Path) -> Path:
    """Channel names in capitals, values 3 and 7 (gaps), an ignore label, saved folds, a test case without a label."""
    place = root / "Dataset007_Boxes"
    for case in CASES:
        copy(plain.parent / f"{case}_t1.nii.gz", place / "imagesTr" / f"{case}_0000.nii.gz")
        copy(plain.parent / f"{case}_dseg.nii.gz", place / "labelsTr" / f"{case}.nii.gz")
    copy(plain.parent / "c0_t1.nii.gz", place / "imagesTs" / "t0_0000.nii.gz")
    labels = {"background": 0, "bright": 3, "dim": 7, "ignore": 8}
    values = {"channel_names": {"0": "T1"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (place / "dataset.json").write_text(json.dumps(values))
    (place / "splits_final.json").write_text(json.dumps(FOLDS))
    return place


def in_monai(plain: Path, root: Path) -> Path:
    entries = [
        {"image": f"{plain.parent.name}/{c}_t1.nii.gz", "label": f"{plain.parent.name}/{c}_dseg.nii.gz", "fold": i // 2}
        for i, c in enumerate(CASES)
    ]
    place = plain.parent.parent / f"{root.name}.json"
    copy(plain.parent / "c0_t1.nii.gz", plain.parent / "t0.nii.gz")
    tests = [f"{plain.parent.name}/t0.nii.gz"]
    place.write_text(json.dumps({"training": entries, "testing": tests, "labels": {"3": "bright", "7": "dim"}}))
    return place


def in_bids(plain: Path, root: Path) -> Path:
    place = root / "bids"
    for number, case in enumerate(CASES):
        name = f"sub-p{number // 2}_ses-{case}"
        copy(
            plain.parent / f"{case}_t1.nii.gz",
            place / f"sub-p{number // 2}" / f"ses-{case}" / "anat" / f"{name}_T1w.nii.gz",
        )
        derived = (
            place / "derivatives" / "manual" / f"sub-p{number // 2}" / "anat" / f"{name}_space-orig_desc-a_dseg.nii.gz"
        )
        copy(plain.parent / f"{case}_dseg.nii.gz", derived)
    (place / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n0\tbackground\n3\tbright\n7\tdim\n")
    (place / "dataset_description.json").write_text(json.dumps({"Name": "boxes", "BIDSVersion": "1.9.0"}))
    (place / "participants.tsv").write_text("participant_id\tsite\nsub-p0\tnorth\nsub-p1\tn/a\n")
    return place


MAKERS = {"nnU-Net": in_nnunet, "MONAI data list": in_monai, "BIDS": in_bids}


@pytest.mark.parametrize("name", MAKERS)
def test_a_layout_gives_the_cohort_that_a_table_gives(name: str, plain: Path, tmp_path: Path) -> None:
    place = MAKERS[name](plain, tmp_path)
    assert layout_of(place) == name
    dataset = read_dataset(place)
    assert dataset is not None
    assert dict(dataset.labels) == LABELS
    known = {c.label.read_bytes(): c for c in cohort.read(plain, ["t1"], labels=tuple(LABELS))}
    found = cohort.read(place, ["t1"], labels=tuple(LABELS))
    assert len(found) == 4
    for one in found:
        assert one.case.files["t1"].read_bytes() == known[one.label.read_bytes()].case.files["t1"].read_bytes()
    assert len(references(place)) == 4
    parts = cohort.split(found, validation_share=0.5, seed=0)
    if name != "BIDS":  # the saved fold 0
        assert {c.case.id[:2] for c in parts.validation} == {"c0", "c1"}
    else:
        assert {c.case.group for c in found} == {"sub-p0", "sub-p1"}
        assert [row.get("site") for row in dataset.rows] == ["north", "north", None, None]
    assert len(archive.find(place, ["t1"], output=tmp_path / "out", settle=0).cases) == (4 if name == "BIDS" else 5)


@pytest.mark.parametrize("name", MAKERS)
def test_a_data_set_may_be_named_from_where_one_stands(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = MAKERS[name](plain, tmp_path)
    monkeypatch.chdir(place.parent)
    cases, _ = read_manifest(Path(place.name), ["t1"])
    assert cases
    assert all(path.is_file() for case in cases for path in case.files.values())
    assert len(cohort.read(Path(place.name), ["t1"], labels=tuple(LABELS))) == 4
    assert all(known.path.is_file() for known in references(Path(place.name)))


def test_channels_go_by_name_then_by_number(plain: Path, tmp_path: Path) -> None:
    place = in_nnunet(plain, tmp_path)
    for wanted in ("t1", "T1", "some_role"):  # one channel: its number says enough
        cases, _ = read_manifest(place, [wanted])
        assert all(set(c.files) == {wanted} for c in cases)
    with pytest.raises(ConfigError, match=r"channels \['T1'\], the bundle wants \['ct', 'pet'\]"):
        read_manifest(place, ["ct", "pet"])
    cases, _ = read_manifest(place, ["t1", "t2"])  # a role it lacks: refused case by case, as missing_channel
    assert all(set(c.files) == {"t1"} for c in cases)


def test_regions_ignore_and_folds_of_nnunet(tmp_path: Path) -> None:
    place = tmp_path / "Dataset137_Regions"
    place.mkdir()
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    values = {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": labels, "file_ending": ".nii.gz"}
    (place / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="regions_class_order"):
        nnunet.read(place)
    values["regions_class_order"] = [1, 2, 3]
    values["labels"] = {k: v for k, v in labels.items() if k not in ("background", "ignore")} | {"ignore": 4}
    (place / "dataset.json").write_text(json.dumps({**values, "regions_class_order": [1, 2, 3]}))
    found = nnunet.read(place)
    assert found.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert found.written == (1, 2, 3)
    assert (found.ignore, found.roles, set(found.labels)) == (4, ("FLAIR", "T1"), {1, 2, 3})
    assert found.folds == ()


def test_products_are_a_derivative_data_set(tmp_path: Path) -> None:
    source = tmp_path / "not a data set"
    bids.describe(tmp_path, bundle="liver-1234abcd", source=source, names={0: "background", 7: "big\tliver"})
    values = json.loads((tmp_path / "dataset_description.json").read_text())
    assert (values["DatasetType"], values["GeneratedBy"][0]["Name"]) == ("derivative", "medmamba")
    assert (values["SourceDatasets"], "DatasetLinks" in values) == ([{"URL": source.as_uri()}], False)
    table = [line.split("\t") for line in (tmp_path / "dseg.tsv").read_text().splitlines()]
    assert table[0] == ["index", "name", "color"]
    assert table[2][:2] == ["7", "big liver"]
    assert bids.names_beside(tmp_path / "sub-01_dseg.nii.gz") == {7: "big liver"}
    assert bids.colour(7) == bids.colour(7) != bids.colour(8)
