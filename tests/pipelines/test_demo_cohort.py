"""The demo's cohort: same bytes each time, geometry that agrees with nibabel, every kind of grid, one damaged file."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medmamba.errors import InputError
from medmamba.formats.nifti import NiftiSource, label_names, read_labels
from medmamba.source import read_all
from pipelines.cases.cohort import read as read_cohort
from pipelines.cases.manifest import read_manifest
from pipelines.config import TrainRun
from pipelines.demo import cohort as demo_cohort
from pipelines.demo.cohort import DAMAGED, MAPS, TISSUES, Cohort, build, read_head, rotation
from pipelines.demo.threshold import fit_thresholds, relative_values, write_thresholded
from pipelines.learning.train import build as build_network
from pipelines.scoring.evaluate import evaluate


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return build(tmp_path_factory.mktemp("cohort"), train=3, test=2)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_numbers_same_bytes_and_more_cases_change_none(cohort: Cohort, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(tmp_path, train=3, test=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again, first = files(tmp_path / "train"), files(cohort.train.parent)
    assert again == first
    assert len({v for k, v in first.items() if k.endswith("t1.nii.gz")}) == 3


def test_manifest_names_files_that_are_there(cohort: Cohort) -> None:
    cases, unused = read_manifest(cohort.train, ["t1", "label"])
    assert [c.id for c in cases] == ["sub-01", "sub-02", "sub-03"]
    assert unused == []
    assert all(path.is_file() for c in cases for path in c.files.values())


def test_images_are_what_nibabel_says(cohort: Cohort) -> None:
    orientations = set()
    for path in sorted(cohort.train.parent.parent.glob("t*/*_t1.nii.gz")):
        source, theirs = NiftiSource(path), nibabel.load(path)
        assert np.array_equal(read_all(source).array[0], np.asarray(theirs.dataobj).transpose(2, 1, 0))
        assert np.array_equal(source.grid.affine[:, [2, 1, 0, 3]], theirs.affine)
        assert theirs.header.get_xyzt_units()[0] == "mm"
        assert int(theirs.header["sform_code"]) == 1
        orientations.add(nibabel.aff2axcodes(theirs.affine))
    assert len(orientations) >= 3


def test_labels_lie_on_the_image_and_are_tissue_sized(cohort: Cohort) -> None:
    for path in sorted(cohort.train.parent.parent.glob("t*/*_t1.nii.gz")):
        label_path = path.with_name(path.name.replace("_t1", "_dseg"))
        labels, grid = read_labels(label_path)
        image = NiftiSource(path)
        assert grid == image.grid
        assert label_names(label_path) == {0: "background", **TISSUES}
        grey, white = ((labels == v).sum() * grid.cell_volume / 1000 for v in TISSUES)
        assert 700 < grey < 1500  # ml; the template has about 1040 and 590
        assert 400 < white < 900
        values = read_all(image).array[0]
        assert values[labels == 2].mean() > values[labels == 1].mean() > values[labels == 0].mean()


def test_one_case_in_four_is_tilted(tmp_path: Path) -> None:
    build(tmp_path, train=4, test=0)
    off_axis = []
    for path in sorted((tmp_path / "train").glob("*_t1.nii.gz")):
        affine = NiftiSource(path).grid.affine[:3, :3]
        off_axis.append(bool((np.sort(np.abs(affine), axis=0)[-2] > 0.05).any()))
    assert off_axis == [False, False, False, True]


def test_archive_has_the_test_images_and_one_damaged_file(cohort: Cohort) -> None:
    assert sorted(p.name for p in cohort.archive.iterdir()) == ["sub-04_t1.nii.gz", "sub-05_t1.nii.gz", DAMAGED]
    with pytest.raises(InputError) as caught:
        read_all(NiftiSource(cohort.archive / DAMAGED))
    assert caught.value.code == "corrupt_file"


def test_head_is_the_template() -> None:
    head = read_head()
    assert head.maps.shape == (len(MAPS), *head.grid.shape)
    assert head.grid.spacing == (1.0, 1.0, 1.0)
    assert head.maps.min() == 0
    assert head.maps.max() == 1


def test_rotation_is_a_rotation() -> None:
    turn = rotation(np.array([10.0, -20.0, 30.0]))
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.isclose(np.linalg.det(turn), 1)
    assert np.allclose(rotation(np.array([0.0, 0.0, 90.0])) @ [1, 0, 0], [0, 1, 0])


def test_threshold_is_the_best_pair_on_the_training_cases(cohort: Cohort, tmp_path: Path) -> None:
    cases = read_cohort(cohort.train, ["t1"])
    low, high = fit_thresholds(cases)
    assert low < high

    def mean_dice(pair: tuple[float, float]) -> float:
        """By the definition, one case and tissue after the other."""
        values = []
        for case in cases:
            truth, _ = read_labels(case.label)
            found = np.digitize(relative_values(case.case.files["t1"]), pair)
            values += [
                2 * ((found == v) & (truth == v)).sum() / ((found == v).sum() + (truth == v).sum()) for v in TISSUES
            ]
        return float(np.mean(values))

    best = mean_dice((low, high))
    assert best > 0.6  # far above chance: the baseline is a fair one
    for other in [(low - 0.02, high), (low + 0.02, high), (low, high - 0.02), (low, high + 0.02)]:
        assert mean_dice(other) <= best + 1e-9
    write_thresholded(cases, (low, high), tmp_path)
    scored = evaluate(cohort.train, tmp_path, labels=TISSUES).mean()
    assert scored == pytest.approx(best)


def test_run_file_of_the_demo_is_a_run(cohort: Cohort) -> None:
    path = Path(demo_cohort.__file__).with_name("demo.toml")
    run = TrainRun.load(path, manifest=cohort.train)
    assert list(run.labels.values()) == list(TISSUES.values())
    assert build_network(run) is not None
