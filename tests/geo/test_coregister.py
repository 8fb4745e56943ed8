"""Known shifts come back to 0.1 px, whatever the gain, the noise and the change; three verdicts."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import fourier_shift

from geo.align import seen_on
from geo.coregister import Limits, Registration, block_shifts, coregister, middle_of
from geo.raster import RasterSource
from medmamba.errors import InputError
from medmamba.windows import Window
from tests.geo.maker import SceneOf, texture, write_tif


def moved(array: np.ndarray, rows: float, cols: float) -> np.ndarray:
    """The array shifted (towards higher indices) by the phase of its spectrum: exact, periodic."""
    return np.stack([np.fft.ifft2(fourier_shift(np.fft.fft2(a), (rows, cols))).real for a in array])


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.3, -0.7), (1.37, 2.61), (-6.4, 3.45)])
def test_known_shifts_are_found(shift: tuple[float, float]) -> None:
    ground = texture((600, 560), 3)
    noise = np.random.default_rng(1).normal(0, 0.02, ground.shape)
    other = moved(ground, *shift) * 1.4 + 0.3 + noise
    other[:, 100:180, 200:330] = texture((80, 130), 3, seed=9)  # real change
    blocks, tried = block_shifts(SceneOf(ground), SceneOf(other))
    assert len(blocks) == tried == 4
    np.testing.assert_allclose(middle_of(blocks)[0], shift, atol=0.05)


def test_a_shift_is_applied_and_what_is_left_is_told(tmp_path: Path) -> None:
    ground = texture((500, 520), 2)
    before = RasterSource(write_tif(tmp_path / "a.tif", np.clip(ground * 1000, 0, None).astype("uint16")))
    after = RasterSource(
        write_tif(tmp_path / "b.tif", np.clip(moved(ground, 1.3, -2.4) * 1000, 0, None).astype("uint16"))
    )
    seen, told = coregister(before, after)
    assert told.verdict == "applied"
    np.testing.assert_allclose(told.shift_px, (1.3, -2.4), atol=0.1)
    assert np.hypot(*told.left_px) < 0.1
    middle = (slice(None), slice(20, -20), slice(20, -20))
    off = [np.abs(s.read(w).array[middle].astype(float) - before.read(w).array[middle]).mean()
           for w in [window_of(before)] for s in (after, seen)]  # fmt: skip
    assert off[1] < 0.2 * off[0]
    assert seen.grid == before.grid
    assert told.to_json()["blocks"][0]["rows_px"] == pytest.approx(1.3, abs=0.1)


def window_of(source: RasterSource) -> Window:
    return Window.whole(source.grid.shape)


def test_verdicts(tmp_path: Path) -> None:
    ground = (texture((500, 520)) * 1000).astype("uint16")
    before = RasterSource(write_tif(tmp_path / "a.tif", ground))
    same, told = coregister(before, before)
    assert (same, told.verdict) == (before, "not applied")
    far = seen_on(before, before.grid, shift_px=(7.0, 6.0))
    _, told = coregister(before, far, Limits(largest=5.0))
    assert told.verdict == "refused"
    with pytest.raises(InputError) as error:
        told.require()
    assert error.value.code == "misregistered"
    _, told = coregister(before, SceneOf(texture((500, 520), seed=5) * 1000, before.grid))
    assert (told.verdict, told.blocks) == ("not applied", ())
    assert "too few" in told.reason
    Registration(verdict="not applied", reason="").require()


def test_blocks_that_disagree_are_refused() -> None:
    ground = texture((600, 600))
    other = ground.copy()
    other[:, :, 300:] = moved(ground, 0.0, 4.0)[:, :, 300:]  # one half slid along a fault
    _, told = coregister(SceneOf(ground), SceneOf(other))
    assert told.verdict == "refused"
    assert told.spread_px > 1


def test_blocks_without_data_do_not_vote() -> None:
    ground = texture((600, 600))
    valid = np.ones((600, 600), dtype=bool)
    valid[:, 250:] = False
    blocks, tried = block_shifts(SceneOf(ground, valid=valid), SceneOf(moved(ground, 0.0, 1.0)))
    assert (len(blocks), tried) == (2, 4)
