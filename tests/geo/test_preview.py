"""Small pictures of rasters, by slab."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from geo.preview import class_picture, picture, write_png
from geo.radiometry import Stretch
from tests.geo.maker import SceneOf


@pytest.mark.parametrize("longest", [5, 7, 20, 50])
def test_scene_picture_is_the_mean_of_blocks(longest: int) -> None:
    draw = np.random.default_rng(0)
    array = draw.uniform(0, 2, (3, 20, 13))
    valid = draw.random((20, 13)) > 0.2
    valid[:4, :4] = False
    side = max(1, -(-20 // longest))
    found = picture(SceneOf(array, valid=valid), Stretch(low=(0, 0, 0), high=(2, 2, 2)), (2, 1, 0), longest=longest)
    assert found.shape == (-(-20 // side), -(-13 // side), 4)
    for row, col in np.ndindex(found.shape[:2]):
        block = slice(row * side, row * side + side), slice(col * side, col * side + side)
        seen = valid[block]
        assert found[row, col, 3] == (255 if seen.any() else 0)
        if seen.any():
            expected = [array[band][block][seen].mean() / 2 * 255 for band in (2, 1, 0)]
            np.testing.assert_allclose(found[row, col, :3], expected, atol=0.51)


def test_class_picture_shows_small_change(tmp_path: Path) -> None:
    codes = np.zeros((1, 12, 12), dtype="uint8")
    codes[0, 5, 5], codes[0, 8:, :] = 1, 2
    codes[0, 11, 11] = 1
    found = class_picture(SceneOf(codes), {1: (9, 8, 7), 2: (1, 2, 3)}, longest=3)
    assert found[1, 1].tolist() == [9, 8, 7, 255]
    assert found[2, 2].tolist() == [1, 2, 3, 255]
    assert found[0, 0].tolist() == [0, 0, 0, 0]
    write_png(tmp_path / "a.png", found)
    with Picture.open(tmp_path / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read), found)
