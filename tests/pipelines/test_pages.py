"""The picture of a case and the page of a run: true proportions, same bytes, nothing from outside is trusted."""

import io
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from medmamba.errors import REASON_CODES
from medmamba.grid import PIXELS, RAS, Grid
from medmamba.sample import Image
from medmamba.source import ArraySource
from medmamba.windows import Window
from pipelines.pages.preview import colour, middle_of, planes_of, preview_png
from pipelines.pages.report import ADVICE, judge, write_report
from pipelines.report import Report

NAMES = {0: "background", 1: "grey matter", 2: "white matter"}


class Watched(ArraySource):
    """Remembers how many cells were read."""

    cells = 0

    def read(self, window: Window) -> Image:
        self.cells += int(np.prod(window.size))
        return super().read(window)


def volume(shape: tuple[int, int, int] = (20, 30, 25), spacing: tuple[float, ...] = (4.0, 1.0, 2.0)) -> Watched:
    affine = np.eye(4)
    affine[:3, :3] = np.fliplr(np.diag(spacing[::-1]))  # columns: steps of z, y, x in world x, y, z
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    return Watched(Image(array, Grid(shape, affine, RAS), ("t1",)))


def ball(shape: tuple[int, ...]) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.int32)
    labels[8:14, 10:20, 9:15] = 1
    labels[9:12, 12:16, 10:13] = 2
    return labels


def test_preview_same_bytes_and_quick(tmp_path: Path) -> None:
    source = volume()
    times = []
    for name in "abc":
        started = time.perf_counter()
        preview_png(tmp_path / f"{name}.png", source, ball(source.grid.shape), NAMES)
        times.append(time.perf_counter() - started)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 1
    assert min(times) < 2  # 0.2 s on a quiet machine; the first one loads fonts
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_preview_reads_three_planes_only() -> None:
    source = volume()
    z, y, x = source.grid.shape
    planes_of(source, ball(source.grid.shape))
    assert source.cells == y * x + z * x + z * y


def test_planes_have_true_proportions_and_place() -> None:
    source = volume()
    labels = ball(source.grid.shape)
    axial, coronal, sagittal = planes_of(source, labels)
    assert [p.title for p in (axial, coronal, sagittal)] == ["axial", "coronal", "sagittal"]
    assert axial.extent_mm == (50.0, 30.0)  # 25 cells of 2 mm, 30 cells of 1 mm
    assert coronal.extent_mm == (50.0, 80.0)  # 20 cells of 4 mm upwards
    assert sagittal.extent_mm == (30.0, 80.0)
    middle = middle_of(labels)
    assert np.array_equal(axial.labels, labels[middle[0]])
    assert np.array_equal(axial.grey, source.image.array[0, middle[0]])


@pytest.mark.parametrize(("order", "flips"), [((2, 0, 1), (True, False, True)), ((1, 2, 0), (False, True, False))])
def test_planes_do_not_depend_on_how_the_file_is_stored(order: tuple[int, ...], flips: tuple[bool, ...]) -> None:
    source, labels = volume(), ball((20, 30, 25))
    reverse = tuple(slice(None, None, -1) if f else slice(None) for f in flips)
    array = source.image.array[0].transpose(order)[reverse]
    stored = ArraySource(Image(array[None], source.grid.permute(order, flips), ("t1",)))
    for one, other in zip(planes_of(source, labels), planes_of(stored, labels.transpose(order)[reverse]), strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.grey, other.grey)


def test_middle_of_hollow_and_empty_labels() -> None:
    labels = np.zeros((9, 9), dtype=int)
    assert middle_of(labels) == (4, 4)
    labels[1, :], labels[7, :2] = 1, 1
    assert labels[middle_of(labels)[0]].any()  # the centroid's row 2 is empty
    tiny = np.zeros((200, 200, 200), dtype=np.uint8)  # found on a thinned copy, where this one cell is lost
    tiny[101, 33, 7] = 1
    assert middle_of(tiny) == (101, 33, 7)


def test_preview_of_raster_nan_and_constant(tmp_path: Path) -> None:
    array = np.full((1, 40, 60), 7.0, dtype=np.float32)
    array[0, :5] = np.nan
    source = ArraySource(Image(array, Grid((40, 60), np.eye(3), PIXELS), ("red",)))
    preview_png(tmp_path / "a.png", source, np.zeros((40, 60), dtype=int), {})
    with Picture.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height


def test_colours_are_told_apart() -> None:
    assert len({tuple(round(c, 2) for c in colour(v)) for v in range(1, 60)}) == 59


def case(name: str, volumes: tuple[float, float] = (1000.0, 600.0), **other: object) -> Report:
    rows = {
        str(i + 1): {
            "name": NAMES[i + 1],
            "voxels": int(v * 37),
            "volume_ml": v,
            "intensity_mean": 400.0 if v else None,
            "intensity_std": 20.0 if v else None,
            "truncated": False,
        }
        for i, v in enumerate(volumes)
    }
    values: dict[str, object] = {
        "case": name,
        "key": "k",
        "status": "done",
        "bundle": {"name": "tissue", "id": "ab" * 32},
        "inputs": {"t1": {"path": f"/archive/{name}.nii.gz", "size": 5, "sha256": "cd" * 32}},
        "outputs": {f"{name}_dseg.nii.gz": {"size": 5}, f"{name}_dseg.png": {"size": 5}},
        "grid": {"shape": [4, 5, 6], "affine": np.diag([3.0, 2.0, 1.0, 1.0]).tolist(), "frame": RAS},
        "numbers": {"labels": rows},
        "run": {"code": "0.1.0+abc", "device": "cpu", "started": "2026-01-01T00:00:00+00:00", "seconds": 2.5},
    }
    return Report(**(values | other))  # type: ignore[arg-type]


def cohort(n: int = 8) -> list[Report]:
    return [case(f"sub-{i}", (1000.0 + 7 * i, 600.0 - 5 * i)) for i in range(n)]


def test_suspicion_finds_the_odd_ones() -> None:
    odd = [
        case("large", (3000.0, 600.0)),
        case("empty", (0.0, 0.0), warnings=("empty output: no voxel was given a label",)),
        case("absent", (1000.0, 0.0)),
    ]
    points = judge([*cohort(), *odd])
    assert max(s.points for s in points[:8]) < 2
    large, empty, absent = points[8:]
    assert large.points >= 10
    assert "grey matter is unusually large" in large.reasons[0]
    assert empty.points == 11
    assert absent.points >= 5
    assert "white matter was not found" in absent.reasons[0]


def test_suspicion_of_few_cases_does_not_compare_volumes() -> None:
    points = judge([case("a"), case("b", (5000.0, 1.0)), case("c", warnings=("batch halved",))])
    assert [s.points for s in points] == [0, 0, 1]
    cut = case("d")
    cut.numbers["labels"]["2"]["truncated"] = True
    assert judge([cut])[0].reasons == ("cut by the image border: white matter",)


class Tags(HTMLParser):
    """Which tags and addresses a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.addresses.extend(value or "" for name, value in attrs if name in ("src", "href", "srcset", "data"))


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>.nii.gz'


def test_page_trusts_no_text_and_links_nowhere(tmp_path: Path) -> None:
    inputs = {EVIL: {"path": f"/archive/{EVIL}", "size": 1, "sha256": EVIL}}
    bad = Report(
        case=EVIL,
        key="k",
        status="set_aside",
        bundle={"name": EVIL, "id": EVIL},
        inputs=inputs,
        code="corrupt_file",
        message=EVIL,
    )
    reports = [
        *cohort(),
        case("evil", inputs=inputs, warnings=(EVIL,), group=EVIL, run={"code": EVIL, "seconds": None}),
    ]
    reports[0].numbers["labels"]["1"]["name"] = EVIL
    page = write_report(tmp_path, reports, [bad], EVIL).read_text()
    seen = Tags()
    seen.feed(page)
    assert not {"iframe", "object", "link", "form"} & set(seen.tags)
    assert seen.tags.count("script") == 1  # the page's own; the policy lets no other run
    assert page.count("sha256-") == 1
    assert "img" not in seen.tags  # the only <img> would be the injected one: no picture lies in the folder
    assert all(a.startswith("#case") for a in seen.addresses)
    assert "&lt;script&gt;" in page


def test_page_tells_everything(tmp_path: Path) -> None:
    reports = [*cohort(), case("large", (3000.0, 600.0))]
    for report in reports:
        noise = np.random.default_rng(0).integers(0, 255, (350, 1140, 3), dtype=np.uint8)
        Picture.fromarray(noise).save(tmp_path / f"{report.case}_dseg.png")
    (tmp_path / "sub-3_dseg.png").write_bytes(b"\x89PNG damaged")
    bad = Report(
        case="sub-99",
        key="k",
        status="set_aside",
        bundle={"name": "tissue", "id": "ab" * 32},
        inputs={"t1": {"path": "/archive/sub-99.nii.gz"}},
        code="corrupt_file",
        message="/archive/sub-99.nii.gz: damaged gzip",
    )
    path = write_report(tmp_path, reports, [bad], "tissue, 9 cases")
    first = path.read_bytes()
    page = first.decode()
    assert re.search(r"1500|3000", page)
    assert page.index('href="#case1">large') < page.index(">sub-0</a>")
    assert page.count("data:image/jpeg;base64,") == 8
    assert "picture of this case is missing or damaged" in page
    for text in (
        "corrupt_file",
        REASON_CODES["corrupt_file"],
        ADVICE["corrupt_file"],
        "damaged gzip",
        "ab" * 32,
        "0.1.0+abc",
    ):
        assert text in page
    assert write_report(tmp_path, reports, [bad], "tissue, 9 cases").read_bytes() == first


def test_page_quotes_the_ceiling_of_the_bundle_and_finds_products_in_folders(tmp_path: Path) -> None:
    ceiling = {"1": {"name": NAMES[1], "dice": 0.9714, "lowest": 0.9521, "n": 4}}
    name = "sub-1/anat/sub-1_space-orig_desc-tissue_dseg.png"
    numbers = {**case("a").numbers, "interpolation_ceiling": ceiling}
    told = case("sub-1", outputs={name: {"size": 5}}, numbers=numbers)
    outside = case("out", outputs={"../out_dseg.png": {"size": 5}})
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    for place in (tmp_path / "run" / name, tmp_path / "out_dseg.png"):
        Picture.new("RGB", (60, 20)).save(place)
    page = write_report(tmp_path / "run", [told, outside], [], "one run").read_text()
    assert f"{NAMES[1]} 0.971 (lowest 0.952, n 4)" in page
    assert page.count('<td class="number">0.971</td>') == 1
    assert page.count("data:image/jpeg;base64,") == 1


def test_page_of_many_cases_stays_small(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    smooth = np.linspace(0, 255, 570 * 175 * 3).reshape(175, 570, 3).astype(np.uint8)
    Picture.fromarray(smooth).save(buffer, "PNG")
    reports = cohort(520)
    for report in reports:
        (tmp_path / f"{report.case}_dseg.png").write_bytes(buffer.getvalue())
    page = write_report(tmp_path, reports, [], "many").read_text()
    assert page.count("data:image/jpeg") == 500
    assert page.count("this one lies beside it") == 20
    assert len(page) < 25e6


def test_every_reason_code_has_advice() -> None:
    assert set(ADVICE) == set(REASON_CODES)


def test_page_without_cases(tmp_path: Path) -> None:
    page = write_report(tmp_path, [], [], "nothing").read_text()
    assert "No case has a result" in page
    assert "No case was set aside" in page
