"""What can be seen: product classes first, a spectral test else; 254 and 255 on the way out; hectares hidden."""

import numpy as np
import pytest

from geo.crs import CellArea
from geo.quality import (
    CLEAR,
    CLOUD,
    NO_DATA,
    SHADOW,
    ClearSource,
    MaskingSink,
    QualitySource,
    codes_of_qa_pixel,
    codes_of_reflectance,
    codes_of_scl,
    observability,
    unobserved,
)
from medmamba.errors import InputError
from medmamba.sample import Image
from medmamba.source import ArraySink, ArraySource, read_all
from medmamba.windows import Window
from tests.geo.maker import SceneOf, grid, texture


def test_scene_classes_and_qa_bits() -> None:
    scl = np.arange(12, dtype="uint8")
    expected = [NO_DATA, NO_DATA, 0, SHADOW, 0, 0, 0, 0, CLOUD, CLOUD, CLOUD, 0]
    assert codes_of_scl(scl).tolist() == expected
    bits = np.array([1, 21824, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, (1 << 3) | (1 << 4)], dtype="uint16")
    assert codes_of_qa_pixel(bits).tolist() == [NO_DATA, CLEAR, CLOUD, CLOUD, CLOUD, SHADOW, CLEAR, CLOUD]


def test_spectral_test() -> None:
    cases = {
        "cloud": ((0.5, 0.5, 0.5, 0.6), CLOUD),
        "sand": ((0.2, 0.3, 0.4, 0.5), CLEAR),
        "field": ((0.05, 0.08, 0.05, 0.4), CLEAR),
        "shadow": ((0.03, 0.03, 0.03, 0.04), SHADOW),
        "bright red roof": ((0.31, 0.35, 0.9, 0.9), CLEAR),
    }
    bands = np.array([value for value, _ in cases.values()]).T[:, None]
    assert codes_of_reflectance(bands)[0].tolist() == [code for _, code in cases.values()]


@pytest.fixture
def dates() -> tuple[QualitySource, QualitySource]:
    """Two dates 8 x 10: the first has no data in column 0 and cloud in rows 0-1, the second shadow in row 7."""
    clear = np.full((4, 8, 10), 0.2, dtype="float32")
    clear[0] = 0.1
    first, second = clear.copy(), clear.copy()
    first[:, :2] = 0.5
    second[:, 7] = 0.02
    valid = np.ones((8, 10), dtype=bool)
    valid[:, 0] = False
    return tuple(QualitySource(SceneOf(a, valid=v, units="reflectance")) for a, v in ((first, valid), (second, None)))


def test_masking_and_hectares(dates: tuple[QualitySource, QualitySource]) -> None:
    whole = Window.whole((8, 10))
    flags = unobserved(dates, whole)
    expected = np.zeros((8, 10), dtype="uint8")
    expected[:2], expected[7], expected[:, 0] = 254, 254, 255
    np.testing.assert_array_equal(flags, expected)
    classes, confidence = ArraySink(1, (8, 10), "uint8"), ArraySink(1, (8, 10), "uint8")
    for sink, hidden in ((classes, 254), (confidence, 255)):
        masking = MaskingSink(sink, dates, hidden=hidden)
        for row in (0, 3, 6):
            size = (min(3, 8 - row), 10)
            masking.write(Window(start=(row, 0), size=size), np.full((1, *size), 7, dtype="uint8"))
        masking.close()
    np.testing.assert_array_equal(classes.array[0], np.where(expected > 0, expected, 7))
    np.testing.assert_array_equal(confidence.array[0], np.where(expected > 0, 255, 7))
    told = observability(dates, CellArea(grid((8, 10), 100.0)))
    assert told["unit"] == "ha"
    for key, cells in (("observed", 45), ("not_observable", 27), ("nodata", 8)):
        assert told[key] == pytest.approx(cells, rel=2e-3)  # 1 ha a cell of the plane, UTM scale apart
    assert told["dates"][0]["cloud"] == pytest.approx(18, rel=2e-3)
    assert told["dates"][1]["shadow"] == pytest.approx(10, rel=2e-3)


def test_clear_source_hides_clouds(dates: tuple[QualitySource, QualitySource]) -> None:
    clear = ClearSource(dates[0])
    image = read_all(clear)
    assert not image.valid[:2].any()
    assert image.valid[2:, 1:].all()
    assert clear.notes[-1] == "clouds by: spectral"


def test_rules_in_order() -> None:
    scene = SceneOf(np.full((4, 3, 3), 0.9, dtype="float32"), units="reflectance")
    classes = ArraySource(Image(np.full((1, 3, 3), 4, dtype="uint8"), scene.grid, ("SCL",)))
    assert QualitySource(scene, classes).rule == "SCL"
    assert (read_all(QualitySource(scene, classes)).array == CLEAR).all()  # vegetation says the product, bright or not
    assert (read_all(QualitySource(scene)).array == CLOUD).all()
    grey = QualitySource(SceneOf((texture((3, 3), 4) * 255).astype("uint8")))
    assert grey.rule == "nodata only"
    assert (read_all(grey).array == CLEAR).all()
    with pytest.raises(InputError) as error:
        QualitySource(scene, ArraySource(Image(np.zeros((1, 3, 4), "uint8"), grid((3, 4)), ("SCL",))))
    assert error.value.code == "grid_mismatch"
