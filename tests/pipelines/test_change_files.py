"""Maps on disk against labels: what is not observed does not count, both protocols, class ids never mistaken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from geo.formats.geotiff import CogSink, class_layer
from medmamba.errors import ConfigError
from medmamba.windows import Window
from pipelines.layouts.change import read_layout
from pipelines.layouts.change_labels import ORDERS
from pipelines.scoring.change_files import evaluate_maps
from tests.geo.maker import grid

SHAPE = (20, 30)
CHANGED = (slice(5, 15), slice(10, 20))


def write_set(root: Path) -> Path:
    """SECOND's folders with one pair of ids: class 1 becomes 5 in a block; a row that nobody labelled."""
    for folder, inside in (("im1", 50), ("im2", 90), ("label1", 1), ("label2", 5)):
        pixels = np.zeros(SHAPE, np.uint8)
        pixels[CHANGED] = inside
        if folder.startswith("label"):
            pixels[0] = 255
        (root / folder).mkdir(parents=True)
        Picture.fromarray(pixels).save(root / folder / "7.png")
    return root


def write_maps(folder: Path, order: str) -> Path:
    """The very change, but for a block of cells that a cloud hid and a row of class 2 instead of 5."""
    names = dict(enumerate(ORDERS[order]))
    for layer, inside in (("change", 1), ("from", 1), ("to", 5)):
        array = np.zeros((1, *SHAPE), np.uint8)
        array[(0, *CHANGED)] = inside
        if layer == "to":
            array[0, 5, 10:20] = 2
        array[0, 12:15, 10:20] = 254
        told = names if layer != "change" else {0: "unchanged", 1: "changed"}
        sink = CogSink(
            folder / f"7_{layer}.tif", grid(SHAPE), class_layer(told, dict.fromkeys(told, (9, 9, 9))), key="k"
        )
        sink.write(Window.whole(SHAPE), array)
        sink.close()
    return folder


def test_semantic_maps_by_both_protocols(tmp_path: Path) -> None:
    found = read_layout(write_set(tmp_path / "set"))
    told = evaluate_maps(found, write_maps(tmp_path / "maps", "open_cd"), output=tmp_path).summary()
    assert told["binary"]["figures"]["f1"] == 1.0
    assert np.sum(told["binary"]["matrix"]) == 20 * 30 - 30 - 30  # without the row of 255 and the cloud
    right, wrong = 70 + 60, 10  # cells of both dates: earlier all, later but one row
    assert told["per_date"]["figures"]["f_scd"] == pytest.approx(right / (right + wrong))
    assert told["from_to"]["figures"]["f_scd"] == pytest.approx(60 / 70)
    assert (tmp_path / "change_evaluation.json").is_file()


def test_ids_in_another_order_are_refused(tmp_path: Path) -> None:
    found = read_layout(write_set(tmp_path / "set"))
    with pytest.raises(ConfigError, match="the same ids mean something else"):
        evaluate_maps(found, write_maps(tmp_path / "maps", "mambacd"))


def test_published_pictures_are_scored_where_they_lie(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "change_levir"
    scores = evaluate_maps(read_layout(folder), folder / "predict_BIT")
    assert scores.summary()["binary"]["figures"]["f1"] == pytest.approx(0.9365, abs=5e-5)  # told with the files
    assert any(line.split() == ["f1", "0.9365", "[0.9260,", "0.9564]"] for line in scores.table())
