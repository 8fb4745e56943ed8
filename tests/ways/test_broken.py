"""Damaged input from file to record: every file has one exact code; nothing is an internal error, nothing stops."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tomllib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from flows import batch
from flows.batch import ASIDE, run_batch
from flows.work import run_in_order
from medmamba.bundle import Bundle, save_bundle
from medmamba.errors import InputError
from medmamba.source import read_all
from pipelines.cases.case import safe_id
from pipelines.cases.formats import open_source
from pipelines.networks import NETWORKS
from tests.ways.tiny import make_bundle, write_volume

TABLE = Path(__file__).with_name("broken.toml")
CLAIM = (10_000, 10_000, 10_000)  # 10^12 voxels
SMALL_MIB = 16  # more memory than this and a claim was believed


@pytest.fixture(autouse=True)
def mlflow_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(batch, "start_run", away)


def bundle_with(folder: Path, **expects: tuple[float, float]) -> Bundle:
    """The tiny bundle with a channel that expects its units."""
    plain = make_bundle(folder / "plain")
    contract = plain.preprocessing
    channels = tuple(replace(c, **expects) for c in contract.channels)
    return save_bundle(
        folder / "ct",
        name="ct",
        network=plain.network,
        config=plain.config,
        preprocessing=replace(contract, channels=channels),
        task=plain.task,
        states=[NETWORKS[plain.network](plain.config).state_dict()],
    )


def outcome(files: list[Path], bundle: Bundle, work: Path) -> dict[str, str]:
    """One batch over a table that names the files: what became of each ("done" or its code)."""
    work.mkdir(parents=True, exist_ok=True)
    names = {safe_id(str(i)): path for i, path in enumerate(files)}
    with (work / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "ct"), *((name, str(path)) for name, path in names.items())])
    said: list[str] = []
    code = run_batch(
        input=work / "list.csv", bundle=str(bundle.folder), output=work / "out", settle=0, echo=said.append,
        runner=run_in_order,
    )  # fmt: skip
    assert code == ASIDE, said
    folder = work / "out" / bundle.title
    records = {p.stem: json.loads(p.read_text())["code"] for p in folder.glob("set_aside/*.json")}
    records |= {p.name.removesuffix("_dseg.json"): "done" for p in folder.glob("*_dseg.json")}
    return {path.name: records[name] for name, path in names.items()}


def test_every_broken_file_has_its_code(shared: Path, tmp_path: Path) -> None:
    expected = tomllib.loads(TABLE.read_text())["codes"]
    files = sorted(p for p in (shared / "data" / "broken").iterdir() if p.name != "README.md")
    assert {p.name for p in files} == set(expected), "the table names every file"
    good = write_volume(tmp_path / "good.nii.gz")
    mended = [p for p in files if expected[p.name] == "done"]  # large slices: read here, not shown to a network
    for path in mended:
        assert read_all(open_source(path)).array.std() > 0
    found = outcome([*(p for p in files if p not in mended), good], make_bundle(tmp_path / "bundle"), tmp_path)
    assert found.pop("good.nii.gz") == "done"  # one good case among them comes out
    assert found == {name: code for name, code in expected.items() if code != "done"}


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def noise(kind: str = "int16", shape: tuple[int, ...] = (12, 12, 12)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(kind)


def flipped_crc(folder: Path) -> Path:
    path = nifti(folder / "crc.nii.gz", noise())
    packed = bytearray(path.read_bytes())
    packed[-6] ^= 1
    path.write_bytes(packed)
    return path


def with_nan(folder: Path) -> Path:
    array = noise("float32")
    array[:1] = np.nan  # 8 %
    return nifti(folder / "nan.nii", array)


def scaled_to_one(folder: Path) -> Path:
    """Numbers of 0..1 where Hounsfield units are expected."""
    return nifti(folder / "unit.nii.gz", ((noise("float32") + 1000) / 2000).astype(np.float32))


def metres(folder: Path) -> Path:
    """Millimetres under a header that says metres."""
    affine = np.diag([0.7, 0.7, 0.7, 1])
    affine[0, 3] = 120
    image = nib.Nifti1Image(noise(), affine)
    image.header.set_xyzt_units("meter")
    nib.save(image, folder / "metres.nii")
    return folder / "metres.nii"


def claiming_nifti(folder: Path) -> Path:
    header = nib.Nifti1Header()
    header.set_data_shape(CLAIM)
    header["vox_offset"] = 352
    path = folder / "claim.nii"
    path.write_bytes(header.binaryblock + bytes(4))
    return path


def claiming_gzip(folder: Path) -> Path:
    path = folder / "claim.nii.gz"
    path.write_bytes(gzip.compress(claiming_nifti(folder).read_bytes()))
    return path


def claiming_mgz(folder: Path) -> Path:
    header = nib.MGHImage(noise("float32"), np.eye(4)).header
    header["dims"] = (*CLAIM, 1)
    path = folder / "claim.mgz"
    path.write_bytes(gzip.compress(header.binaryblock))
    return path


def text_header(folder: Path, name: str, text: str, data: bytes = b"") -> Path:
    path = folder / name
    path.write_bytes(text.encode() + data)
    return path


META = "ObjectType = Image\nNDims = 3\nDimSize = {} {} {}\nElementType = MET_SHORT\nElementDataFile = {}\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: {} {} {}\nencoding: {}\nendian: little\n{}\n"


def claiming_meta(folder: Path) -> Path:
    return text_header(folder, "claim.mha", META.format(*CLAIM, "LOCAL"), bytes(100))


def claiming_nrrd(folder: Path) -> Path:
    return text_header(folder, "claim.nrrd", NRRD.format(*CLAIM, "gzip", ""), gzip.compress(bytes(100)))


def claiming_tiff(folder: Path) -> Path:
    import tifffile

    path = folder / "claim.tif"
    tifffile.imwrite(path, noise("uint16", (8, 8)), photometric="minisblack", byteorder="<")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        places = [file.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for place in places:
        data[place : place + 4] = (1_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def outside_its_folder(folder: Path) -> Path:
    (folder / "secret.raw").write_bytes(bytes(16))
    (folder / "sub").mkdir()
    return text_header(folder / "sub", "outside.mhd", META.format(2, 2, 2, "../secret.raw"))


def half_a_nrrd(folder: Path) -> Path:
    path = folder / "half.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise()), str(path), useCompression=True)
    path.write_bytes(path.read_bytes()[:-400])
    return path


def unreadable(folder: Path) -> Path:
    path = nifti(folder / "closed.nii", noise())
    path.chmod(0)
    return path


MAKERS: list[tuple[Callable[[Path], Path], str]] = [
    (flipped_crc, "corrupt_file"),
    (with_nan, "non_finite"),
    (scaled_to_one, "wrong_units"),
    (metres, "bad_geometry"),
    (claiming_nifti, "corrupt_file"),
    (claiming_gzip, "corrupt_file"),
    (claiming_mgz, "corrupt_file"),
    (claiming_meta, "corrupt_file"),
    (claiming_nrrd, "corrupt_file"),
    (claiming_tiff, "corrupt_file"),
    (outside_its_folder, "bad_header"),
    (half_a_nrrd, "corrupt_file"),
    (lambda f: nifti(f / "same.nii", np.zeros((12, 12, 12), np.int16)), "empty_image"),
    (lambda f: nifti(f / "four.nii", noise(shape=(6, 6, 6, 2))), "wrong_channels"),
    (lambda f: nifti(f / "five.nii", noise(shape=(4, 4, 4, 2, 2))), "wrong_channels"),
    (lambda f: nifti(f / "complex.nii", noise("complex64")), "unsupported_format"),
    (lambda f: nifti(f / "flat.nii", noise(), np.diag([1e-9, 1, 1, 1])), "bad_geometry"),
    (lambda f: nifti(f / "far.nii", noise(), np.diag([1e7, 1e7, 1e7, 1])), "bad_geometry"),
    (lambda f: text_header(f, "gone.mhd", META.format(2, 2, 2, "gone.raw")), "missing_file"),
    (lambda f: text_header(f, "many.mhd", META.format(2, 2, 2, "LIST")), "unsupported_format"),
    (lambda f: text_header(f, "list.nhdr", NRRD.format(2, 2, 2, "raw", "data file: s%d 1 2 1")), "unsupported_format"),
    (lambda f: text_header(f, "text.nrrd", "no header at all"), "corrupt_file"),
    (lambda f: text_header(f, "text.mgz", "no header at all"), "corrupt_file"),
    (lambda f: text_header(f, "text.mnc", "no header at all"), "corrupt_file"),
    (lambda f: text_header(f, "text.hdr", "no header at all"), "corrupt_file"),
    (lambda f: text_header(f, "text.PAR", "no header at all"), "corrupt_file"),
    (lambda f: text_header(f, "text.HEAD", "no header at all"), "bad_header"),
    (lambda f: text_header(f, "text.tif", "no header at all"), "corrupt_file"),
    (lambda f: f / "never_there.nii.gz", "missing_file"),
    (lambda f: f, "unsupported_format"),  # a folder that is no image
]  # fmt: skip
if os.geteuid() != 0:  # root reads everything
    MAKERS.append((unreadable, "permission"))


def test_every_damage_we_make_has_its_code(tmp_path: Path) -> None:
    folders = [tmp_path / f"{i:02d}" for i in range(len(MAKERS))]
    for folder in folders:
        folder.mkdir()
    files = [maker(folder) for (maker, _), folder in zip(MAKERS, folders, strict=True)]
    bundle = bundle_with(tmp_path / "bundle", low_between=(-2000.0, 100.0), high_between=(100.0, 40_000.0))
    found = outcome(files, bundle, tmp_path / "run")
    assert found == {path.name: code for path, (_, code) in zip(files, MAKERS, strict=True)}


@pytest.mark.parametrize("maker", [m for m, _ in MAKERS if m.__name__.startswith("claiming")], ids=lambda m: m.__name__)
def test_a_claim_of_a_trillion_voxels_takes_no_memory(maker: Callable[[Path], Path], tmp_path: Path) -> None:
    path = maker(tmp_path)
    with pytest.raises(InputError):
        open_source(text_header(tmp_path, f"empty{path.suffix}", ""))  # libraries are loaded before memory is watched
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="claims"):
            read_all(open_source(path))
        assert tracemalloc.get_traced_memory()[1] < SMALL_MIB << 20
    finally:
        tracemalloc.stop()


def test_names_stay_in_the_output_folder_and_out_of_the_page(tmp_path: Path) -> None:
    """Ids and file names that climb, or that are HTML: products lie in their folder, the page shows names as text."""
    source = tmp_path / "in"
    evil = "<img src=x onerror=alert(1)>"
    write_volume(source / f"{evil}.nii.gz", 1)
    write_volume(source / "bad.nii.gz", constant=True)
    rows = [
        ("case", "ct", "group"),
        ("../../up", f"{evil}.nii.gz", evil),
        (evil, "bad.nii.gz", "g"),
        ("/etc/x", "bad.nii.gz", ""),
    ]
    with (source / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    bundle = make_bundle(tmp_path / "bundle")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    run_batch(
        input=source / "list.csv", bundle=str(bundle.folder), output=tmp_path / "out", settle=0, echo=lambda _: None,
        runner=run_in_order,
    )  # fmt: skip
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert new
    assert all(p.is_relative_to(tmp_path / "out") for p in new)
    page = (tmp_path / "out" / bundle.title / "report.html").read_text()
    assert "<img src=x" not in page
    assert "up" in page
