import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import GeometryError
from medmamba.grid import Grid
from medmamba.resample import ResampledSink, ResampledSource
from medmamba.sample import Image
from medmamba.source import ArraySink, ArraySource, read_all
from medmamba.windows import Window

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def image_source(shape: tuple[int, ...], seed: int = 0) -> ArraySource:
    array = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return ArraySource(Image(array, Grid(shape, np.eye(len(shape) + 1)), ("a", "b")))


def truth(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    tensor = torch.from_numpy(array)[None]
    return torch.nn.functional.interpolate(tensor, size=shape, mode="trilinear", align_corners=False)[0].numpy()


@given(shapes, shapes)
def test_whole_equals_torch_interpolate(shape: tuple[int, ...], new: tuple[int, ...]) -> None:
    source = image_source(shape)
    np.testing.assert_allclose(read_all(ResampledSource(source, new)).array, truth(source.image.array, new), atol=2e-6)


@given(shapes, shapes, st.data())
def test_window_equals_whole_exactly(shape: tuple[int, ...], new: tuple[int, ...], data: st.DataObject) -> None:
    source = ResampledSource(image_source(shape), new)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in new)
    window = Window(start=start, size=tuple(data.draw(st.integers(1, n - s)) for n, s in zip(new, start, strict=True)))
    assert np.array_equal(source.read(window).array, read_all(source).array[(slice(None), *window.slices)])


@given(shapes, shapes, st.integers(1, 4))
def test_slabs_through_the_sink_equal_the_whole(shape: tuple[int, ...], new: tuple[int, ...], rows: int) -> None:
    array = image_source(shape).image.array
    out = ArraySink(2, new)
    sink = ResampledSink(out, shape, new)
    for row in range(0, shape[0], rows):
        n = min(rows, shape[0] - row)
        sink.write(Window(start=(row, 0, 0), size=(n, *shape[1:])), array[:, row : row + n])
    np.testing.assert_allclose(out.array, truth(array, new), atol=2e-6)
    assert len(sink.planes) <= 1


def test_slabs_out_of_order_are_refused() -> None:
    sink = ResampledSink(ArraySink(1, (4, 4, 4)), (8, 4, 4), (4, 4, 4))
    with pytest.raises(GeometryError, match="out of order"):
        sink.write(Window(start=(2, 0, 0), size=(1, 4, 4)), np.zeros((1, 1, 4, 4)))


def test_nearest_keeps_labels_and_grid_keeps_the_box() -> None:
    array = np.random.default_rng(1).integers(0, 5, (1, 6, 7, 8)).astype(np.int16)
    source = ArraySource(Image(array, Grid((6, 7, 8), np.diag([1.0, 2, 3, 1])), ("labels",)))
    small = ResampledSource(source, (3, 9, 8), order=0)
    assert small.dtype == np.int16
    assert set(np.unique(read_all(small).array)) <= set(range(5))
    assert small.grid == source.grid.zoom((3, 9, 8))
