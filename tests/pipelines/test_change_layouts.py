"""Change data sets in their own folders: what is read, which class order is stated, which faults are found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from typer.testing import CliRunner

from flows.cli import app
from medmamba.errors import ConfigError, InputError
from pipelines.layouts.change import ChangeSet, read_layout
from pipelines.layouts.change_check import FINDINGS, check
from pipelines.layouts.change_labels import ORDERS, PALETTES, read_change

SIDE = 8
COLOUR = {name: colour for colour, name in PALETTES["second"].items() if colour != (0, 0, 0)}


def save(path: Path, pixels: np.ndarray, palette: list[tuple[int, int, int]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Picture.fromarray(pixels.astype(np.uint8))
    if palette is not None:
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette([value for colour in palette for value in colour])
    picture.save(path)


def image(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3))


def ids(seed: int) -> np.ndarray:
    """Classes 1 to 6 in the lower half, all of them present."""
    made = np.zeros((SIDE, SIDE), dtype=np.uint8)
    made[4:] = np.random.default_rng(seed).permutation(np.arange(32) % 6 + 1).reshape(4, SIDE)
    return made


def coloured(labels: np.ndarray, order: str) -> np.ndarray:
    return np.array([COLOUR[name] for name in ORDERS[order]], dtype=np.uint8)[labels]


def levir(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        save(root / "A" / f"{name}.png", image(number))
        save(root / "B" / f"{name}.png", image(100 + number))
        save(root / "label" / f"{name}.png", (ids(number) > 0) * 255)
    return root


def second(root: Path, folders: tuple[str, ...], labels: str, count: int = 3) -> Path:
    """`labels`: "ids", or the order whose ids `ids` are, written in colours."""
    for split in ("train", "test"):
        for number in range(count):
            seed = number + (50 if split == "test" else 0)
            pictures = [image(seed), image(100 + seed)]
            dates = [ids(seed), ids(200 + seed)]
            pictures += dates if labels == "ids" else [coloured(date, labels) for date in dates]
            for folder, pixels in zip(folders, pictures, strict=True):
                save(root / split / folder / f"{number:05}.png", pixels)
    return root


def codes(dataset: ChangeSet) -> list[str]:
    return [finding.code for finding in check(dataset)]


def test_levir_with_lists(tmp_path: Path) -> None:
    names = [
        f"{split}_{scene}_0000_{crop}"
        for split in ("train", "val", "test")
        for scene in (1, 2)
        for crop in ("0000", "0256")
    ]
    levir(tmp_path, names)
    for split in ("train", "val", "test"):
        lines = [f"{name}.png" for name in names if name.startswith(split)][1 if split == "train" else 0 :]
        (tmp_path / "list").mkdir(exist_ok=True)
        (tmp_path / "list" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "list" / "demo.txt").write_text("train_1_0000_0000.png\n")
    found = read_layout(tmp_path)
    assert found.layout == "levir"
    assert len(found.rows) == 11  # the one that no list names is left out
    assert {row.split for row in found.rows} == {"train", "validation", "test"}
    row = next(row for row in found.rows if row.files["before"].stem == "val_2_0000_0256")
    assert (row.split, row.group) == ("validation", "val_2")
    (change,) = found.labels(row)
    assert np.array_equal(change, ids(names.index("val_2_0000_0256")) > 0)
    assert codes(found) == []
    assert "4 validation" in found.describe()


def test_levir_sample_without_lists(shared: Path) -> None:
    found = read_layout(shared / "data" / "change_levir")
    assert [row.split for row in found.rows].count("train") == 3
    assert len(found.rows) == 6
    assert codes(found) == []
    assert not any(found.labels(row)[0].any() for row in found.rows if "train_386" in row.id)


def test_binary_lists_in_split_folders(tmp_path: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        for number in numbers:
            for folder, pixels in (("T1", image(number)), ("T2", image(9 + number)), ("GT", ids(number) > 0)):
                save(tmp_path / split / folder / f"{number}.png", pixels)
    (tmp_path / "train_set.txt").write_text("1.png\n")
    found = read_layout(tmp_path)
    assert found.layout == "mambacd"
    assert [(row.split, row.id) for row in found.rows] == [("test", "test__2"), ("train", "train__1")]


@pytest.mark.parametrize("order", ["mambacd", "open_cd"])
def test_second_in_colours_is_read_in_the_stated_order(tmp_path: Path, order: str) -> None:
    second(tmp_path, ("im1", "im2", "label1", "label2"), order)
    found = read_layout(tmp_path, order=order)
    assert found.classes is not None
    assert (found.classes.encoding, found.classes.order, found.classes.order_from) == ("colours", order, "setting")
    change, earlier, later = found.labels(found.rows[-1])
    assert np.array_equal(earlier, ids(2))
    assert np.array_equal(later, ids(202))
    assert np.array_equal(change, ids(2) > 0)
    assert codes(found) == []
    own = read_layout(tmp_path)  # unnamed: the layout's own order, and colours still tell every class
    assert own.classes is not None
    assert own.classes.order == "open_cd"
    names = np.array(own.classes.names)[own.labels(found.rows[-1])[1]]
    assert np.array_equal(names, np.array(ORDERS[order])[ids(2)])


def test_second_as_ids_takes_the_order_of_its_layout_and_says_so(tmp_path: Path) -> None:
    semantic = second(tmp_path / "mambacd", ("T1", "T2", "GT_T1", "GT_T2"), "ids")
    for split in ("train", "test"):
        for path in (semantic / split / "GT_T1").glob("*.png"):
            save(semantic / split / "GT_CD" / path.name, (np.asarray(Picture.open(path)) > 0) * 255)
    found = [read_layout(semantic), read_layout(second(tmp_path / "b", ("A", "B", "label1", "label2"), "ids"))]
    assert [one.layout for one in found] == ["mambacd_semantic", "open_cd"]
    assert [one.classes and one.classes.order for one in found] == ["mambacd", "open_cd"]
    assert all("(layout): 0 unchanged" in one.describe() for one in found)
    assert codes(found[0]) == []


def test_indexed_pictures_spell_their_order(tmp_path: Path) -> None:
    second(tmp_path, ("im1", "im2", "label1", "label2"), "ids")
    palette = [COLOUR[name] for name in ORDERS["mambacd"]]
    for path in tmp_path.rglob("label?/*.png"):
        save(path, np.asarray(Picture.open(path)), palette)
    found = read_layout(tmp_path)
    assert found.classes is not None
    assert (found.classes.encoding, found.classes.order, found.classes.order_from) == ("ids", "mambacd", "colours")
    assert np.array_equal(found.labels(found.rows[-1])[1], ids(2))


def test_landsat_colours_are_known(tmp_path: Path) -> None:
    names = {name: colour for colour, name in PALETTES["landsat_scd"].items() if colour != (0, 0, 0)}
    table = np.array([names[name] for name in ORDERS["landsat_scd"]])
    for folder, pixels in (
        ("A", image(0)),
        ("B", image(1)),
        ("labelA", table[ids(0) % 5]),
        ("labelB", table[ids(1) % 5]),
    ):
        save(tmp_path / folder / "1.png", pixels)
    found = read_layout(tmp_path)
    assert found.classes is not None
    assert (found.layout, found.classes.order, found.classes.order_from) == ("landsat_scd", "landsat_scd", "colours")
    assert np.array_equal(found.labels(found.rows[0])[1], ids(0) % 5)


def test_second_in_the_folders_of_landsat_is_told_by_its_six_classes(tmp_path: Path) -> None:
    ids_of_second = read_layout(second(tmp_path / "a", ("A", "B", "labelA", "labelB"), "ids"))
    in_colours = read_layout(second(tmp_path / "b", ("A", "B", "labelA", "labelB"), "mambacd"))
    assert [found.layout for found in (ids_of_second, in_colours)] == ["landsat_scd"] * 2
    assert [found.classes and found.classes.order for found in (ids_of_second, in_colours)] == ["mambacd"] * 2


def test_every_fault_is_found(tmp_path: Path) -> None:
    root = second(tmp_path, ("T1", "T2", "GT_T1", "GT_T2"), "ids", count=8)
    for path in root.rglob("GT_T1/*.png"):
        save(path.parent.parent / "GT_CD" / path.name, np.asarray(Picture.open(path)) > 0)
    assert codes(read_layout(root)) == []
    train, test = root / "train", root / "test"

    def change(path: Path, pixels: np.ndarray) -> None:
        path.unlink()
        save(path, pixels)

    change(train / "GT_T1" / "00000.png", coloured(ids(0), "mambacd"))  # colours among ids
    (train / "GT_CD" / "00001.png").unlink()
    change(train / "T2" / "00002.png", image(2, SIDE + 1))
    change(train / "T2" / "00003.png", image(3))  # both dates the same
    change(train / "T1" / "00004.png", image(105))  # A and B of pairs 4 and 5 crossed
    save(test / "T1" / "00000.png", image(7))  # a training picture in the test split
    with_255 = ids(51)
    with_255[0] = 255
    change(test / "GT_T1" / "00001.png", with_255)
    change(test / "GT_T2" / "00002.png", np.where(ids(252) == 3, 0, ids(252)))  # a class at one date only
    change(test / "GT_CD" / "00003.png", np.zeros((SIDE, SIDE)))
    change(test / "GT_T1" / "00004.png", ids(54) * 20)
    (test / "GT_T1" / "00005.png").write_bytes((test / "GT_T1" / "00005.png").read_bytes()[:60])
    for folder, source in (("T1", 6), ("T2", 106), ("GT_T1", 6), ("GT_T2", 206), ("GT_CD", 6)):
        save(train / folder / "again.png", image(source) if folder in ("T1", "T2") else ids(source))
    save(train / "GT_CD" / "again.png", ids(6) > 0)
    found = {finding.code: finding for finding in check(read_layout(root))}
    assert set(found) == set(FINDINGS) - {"scene_leak"}
    assert {code: one.count for code, one in found.items()} == dict.fromkeys(found, 1)
    assert "train__00004 (before) is train__00005 (after)" in found["swapped_dates"].describe()
    assert "test__00000 (test)" in found["leak"].describe()
    assert not found["label_255"].fault
    order = [finding.fault for finding in check(read_layout(root))]
    assert order == sorted(order, reverse=True)


def test_check_command_tells_what_it_found(tmp_path: Path) -> None:
    levir(tmp_path, ["train_1", "test_1"])
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert done.exit_code == 0
    assert "layout 'levir', 2 pairs (1 test, 1 train)" in done.output
    assert "no fault found" in done.output
    save(tmp_path / "B" / "test_1.png", image(1))
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert done.exit_code == 1
    assert "fault identical_dates (both dates are the same picture): 1: test__test_1" in done.output


def test_crops_of_one_scene_in_two_splits(tmp_path: Path) -> None:
    levir(tmp_path, ["city_0_0", "city_0_1"])
    (tmp_path / "train.txt").write_text("city_0_0\n")
    (tmp_path / "test.txt").write_text("city_0_1\n")
    assert codes(read_layout(tmp_path)) == ["scene_leak"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no known layout"):
        read_layout(tmp_path)
    levir(tmp_path, ["train_1"])
    with pytest.raises(ConfigError, match="layout 'x' unknown"):
        read_layout(tmp_path, layout="x")
    second(tmp_path / "s", ("im1", "im2", "label1", "label2"), "mambacd", count=1)
    with pytest.raises(ConfigError, match="order 'x' unknown; known: mambacd, open_cd, landsat_scd"):
        read_layout(tmp_path / "s", order="x")
    for path in (tmp_path / "s").rglob("label1/*.png"):
        save(path, np.full((SIDE, SIDE, 3), 77))
    with pytest.raises(ConfigError, match="fit no known data set"):
        read_layout(tmp_path / "s")
    save(tmp_path / "grey.png", np.array([[0, 7], [255, 1]]))
    with pytest.raises(InputError, match="0 and 1, or 0 and 255"):
        read_change(tmp_path / "grey.png")
