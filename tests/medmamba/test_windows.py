from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medmamba.ensemble import Mirrored
from medmamba.errors import ConfigError, GeometryError, InputError
from medmamba.grid import Grid
from medmamba.infer import infer
from medmamba.sample import Image
from medmamba.source import (
    ArraySink,
    ArraySource,
    PaddedSource,
    PermutedSink,
    PermutedSource,
    RowCache,
    StackedSource,
    read_all,
)
from medmamba.windows import WEIGHTS, Window, Windowing, axis_starts


def source_of(array: np.ndarray) -> ArraySource:
    channels = tuple(f"c{i}" for i in range(len(array)))
    return ArraySource(Image(array, Grid(array.shape[1:], np.eye(array.ndim)), channels))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Windowing]:
    rank = draw(st.integers(1, 3))
    top = {1: 60, 2: 24, 3: 13}[rank]
    shape = tuple(draw(st.integers(1, top)) for _ in range(rank))
    size = tuple(draw(st.integers(1, 8)) for _ in range(rank))
    overlap = tuple(draw(st.integers(0, w - 1)) for w in size)
    return shape, Windowing(size=size, overlap=overlap, weights=draw(st.sampled_from(sorted(WEIGHTS))))


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 3.7)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 39))
def test_starts_cover_the_axis_and_end_on_it(n: int, w: int, o: int) -> None:
    w, o = min(w, n), min(o, min(w, n) - 1)
    starts = axis_starts(n, w, o)
    assert starts[0] == 0
    assert starts[-1] == n - w
    assert all(0 < b - a <= w - o for a, b in pairwise(starts))


@settings(max_examples=200)
@given(cuts(), st.integers(1, 3))
def test_identity_network_gives_the_image_back(cut: tuple[tuple[int, ...], Windowing], batch: int) -> None:
    shape, windowing = cut
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    sink = ArraySink(2, shape)
    infer(nn.Identity(), source_of(array), sink, classes=2, windowing=windowing, batch=batch)
    np.testing.assert_allclose(sink.array, array, atol=1e-6 * np.abs(array).max(), rtol=0)
    assert (sink.array.argmax(0) == array.argmax(0)).all() or np.abs(np.diff(array, axis=0)).min() < 1e-5


@given(cuts())
def test_constant_in_constant_out(cut: tuple[tuple[int, ...], Windowing]) -> None:
    shape, windowing = cut
    exact, close = ArraySink(1, shape, "float64"), ArraySink(1, shape)
    source = source_of(np.zeros((1, *shape), np.float32))
    infer(Constant(), source, exact, classes=1, windowing=windowing, sums=torch.float64)
    infer(Constant(), source, close, classes=1, windowing=windowing)
    assert (exact.array == np.float32(3.7)).all()
    np.testing.assert_allclose(close.array, 3.7, rtol=1e-6)


@settings(max_examples=200)
@given(cuts(), st.none() | st.integers(1, 20))
def test_slabs_equal_the_weighted_mean_of_the_whole(cut: tuple[tuple[int, ...], Windowing], strip: int | None) -> None:
    """Streamed = whole: the sums of all windows in one big array, in the same order, bit for bit, strips or not."""
    shape, windowing = cut
    shape = tuple(max(n, w) for n, w in zip(shape, windowing.size, strict=True))
    array = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    sink = ArraySink(1, shape)
    infer(nn.Identity(), source_of(array), sink, classes=1, windowing=windowing, strip=strip)
    sums, total, weight = torch.zeros(1, *shape), torch.zeros(shape), windowing.weight()
    for window in windowing.windows(shape):
        sums[(slice(None), *window.slices)].addcmul_(torch.from_numpy(array[(slice(None), *window.slices)]), weight)
        total[window.slices] += weight
    assert np.array_equal(sink.array, (sums / total).numpy())


@given(cuts(), st.integers(1, 20), st.integers(0, 2**31), st.integers(1, 3))
def test_an_interrupted_loop_goes_on_strip_by_strip(
    cut: tuple[tuple[int, ...], Windowing], strip: int, seed: int, batch: int
) -> None:
    """Whatever rows of whatever strips an earlier process finished, the others come out as they would have."""
    shape, windowing = cut
    array = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    whole, rest, boxes = ArraySink(1, shape), ArraySink(1, shape), list[Window]()
    rng = np.random.default_rng(seed)

    def finished(box: Window) -> int:
        boxes.append(box.below(int(rng.integers(0, shape[0] + 1))))
        return boxes[-1].start[0]

    options = {"classes": 1, "windowing": windowing, "batch": batch, "strip": strip}
    infer(nn.Identity(), source_of(array), whole, **options)
    infer(nn.Identity(), source_of(array), rest, finished=finished, **options)
    due = np.zeros(shape, bool)
    for box in boxes:
        due[box.slices] = True
    assert np.array_equal(rest.array[0][due], whole.array[0][due])
    assert not rest.array[0][~due].any()


def test_a_skipped_window_scores_zero() -> None:
    array = np.zeros((1, 4, 32), np.float32)
    array[..., 24:] = 1
    sink = ArraySink(1, (4, 32))
    notes = infer(
        Constant(),
        source_of(array),
        sink,
        classes=1,
        windowing=Windowing(size=(4, 8), overlap=(0, 0), skip_below=0.0),
    )
    assert notes.windows_skipped == 3
    np.testing.assert_allclose(sink.array[..., 24:], 3.7, rtol=1e-6)
    assert not sink.array[..., :24].any()


def test_a_window_without_a_valid_cell_is_not_shown() -> None:
    array = np.ones((1, 4, 32), np.float32)
    valid = np.zeros((4, 32), bool)
    valid[:, 3] = True
    source, sink = ArraySource(Image(array, Grid((4, 32), np.eye(3)), ("a",), valid)), ArraySink(1, (4, 32))
    notes = infer(Constant(), source, sink, classes=1, windowing=Windowing(size=(4, 8), overlap=(0, 0)), batch=3)
    assert notes.windows_skipped == 3
    assert (sink.array[..., :8] > 3).all()
    assert not sink.array[..., 8:].any()


class Counted:
    """A source that counts how often each row is read."""

    def __init__(self, source: ArraySource) -> None:
        self.source, self.grid, self.channels, self.dtype = source, source.grid, source.channels, source.dtype
        self.rows = np.zeros(source.grid.shape[0], int)

    def read(self, window: Window) -> Image:
        self.rows[window.slices[0]] += 1
        return self.source.read(window)


@given(cuts())
def test_every_row_is_read_once(cut: tuple[tuple[int, ...], Windowing]) -> None:
    shape, windowing = cut
    shape = tuple(max(n, w) for n, w in zip(shape, windowing.size, strict=True))
    array = np.random.default_rng(5).normal(size=(1, *shape)).astype(np.float32)
    counted = Counted(source_of(array))
    cache = RowCache(counted, windowing.size[0])
    for window in windowing.windows(shape):
        assert np.array_equal(cache.read(window).array, array[(slice(None), *window.slices)])
    assert (counted.rows == 1).all()
    again = Window(start=(0,) * len(shape), size=windowing.size)  # going back starts afresh
    assert np.array_equal(cache.read(again).array, array[(slice(None), *again.slices)])


class Uneven(nn.Module):
    """Looks to one side only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(2) * x


def test_mirroring_is_the_mean_over_all_flips() -> None:
    x = torch.randn(1, 2, 5, 6)
    flips = [(), (2,), (3,), (2, 3)]
    wanted = sum(Uneven()(x.flip(f)).flip(f) for f in flips) / 4
    torch.testing.assert_close(Mirrored(Uneven(), (0, 1))(x), wanted)
    torch.testing.assert_close(Mirrored(Uneven(), (0, 1))(x.flip(2)), wanted.flip(2))


class Hungry(nn.Module):
    """Runs out of memory above a batch."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("made up: out of memory")
        return x.clone()


def test_out_of_memory_halves_the_batch_and_says_so() -> None:
    array = np.random.default_rng(3).normal(size=(1, 40)).astype(np.float32)
    sink = ArraySink(1, (40,))
    windowing = Windowing(size=(4,), overlap=(2,))
    notes = infer(Hungry(2), source_of(array), sink, classes=1, windowing=windowing, batch=8)
    np.testing.assert_allclose(sink.array, array, atol=1e-6)
    assert notes.batch == 2
    assert len(notes.steps) == 2
    with pytest.raises(InputError) as caught:
        infer(Hungry(0), source_of(array), sink, classes=1, windowing=windowing, batch=2)
    assert caught.value.code == "too_large"


def test_other_errors_pass_through() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not fit")

    array = np.zeros((1, 9), np.float32)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        infer(Broken(), source_of(array), ArraySink(1, (9,)), classes=1, windowing=Windowing(size=(4,), overlap=(0,)))


@given(cuts(), st.sampled_from(["edge", "constant"]))
def test_padded_window_equals_padded_whole(cut: tuple[tuple[int, ...], Windowing], mode: str) -> None:
    shape, windowing = cut
    array = np.random.default_rng(4).integers(0, 99, (1, *shape))
    before, after = [w // 2 for w in windowing.size], list(windowing.size)
    padded = PaddedSource(source_of(array), before, after, mode)
    widths = [(0, 0), *zip(before, after, strict=True)]
    whole = np.pad(array, widths, mode="edge" if mode == "edge" else "constant")
    assert np.array_equal(read_all(padded).array, whole)
    window = Window(start=tuple(0 for _ in shape), size=windowing.size)
    assert np.array_equal(padded.read(window).array, whole[(slice(None), *window.slices)])


@given(st.permutations([0, 1, 2]), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 1000))
def test_permuted_source_and_sink_are_inverse(order: list[int], flips: tuple[bool, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    view = PermutedSource(source_of(array), order, flips)
    back = ArraySink(2, array.shape[1:])
    sink = PermutedSink(back, view.grid.shape, order, flips)
    for window in Windowing(size=(2, 2, 2), overlap=(0, 1, 1)).windows(view.grid.shape):
        sink.write(window, view.read(window).array)
    assert np.array_equal(back.array, array)


def test_stacked_sources_must_lie_on_one_grid() -> None:
    a, b = source_of(np.ones((1, 4, 4))), source_of(np.zeros((2, 4, 4)))
    assert StackedSource(a, b).read(Window.whole((4, 4))).array.shape == (3, 4, 4)
    with pytest.raises(GeometryError, match="grids differ"):
        StackedSource(a, source_of(np.zeros((1, 4, 5))))


def test_bad_windowing_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlap"):
        Windowing(size=(4, 4), overlap=(4, 0))
    with pytest.raises(ConfigError, match="known: gaussian, ramp"):
        Windowing(size=(4,), overlap=(0,), weights="hann")
    with pytest.raises(GeometryError, match="leaves the image"):
        Window(start=(3,), size=(4,)).require_inside((6,))
