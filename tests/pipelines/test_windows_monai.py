"""The window loop against MONAI's, same windows and weights."""

import numpy as np
import pytest
import torch
from torch import nn

from medmamba.grid import Grid
from medmamba.infer import infer
from medmamba.sample import Image
from medmamba.source import ArraySink, ArraySource
from medmamba.windows import Windowing


@pytest.mark.parametrize(
    ("shape", "window"), [((21, 18, 25), (12, 12, 12)), ((40, 33), (16, 8)), ((7, 30, 9), (8, 8, 8))]
)
def test_labels_equal_monai(shape: tuple[int, ...], window: tuple[int, ...]) -> None:
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    network = (nn.Conv3d if len(shape) == 3 else nn.Conv2d)(1, 4, 3, padding=1)
    array = np.random.default_rng(2).normal(size=(1, *shape)).astype(np.float32)
    sink = ArraySink(4, shape)
    source = ArraySource(Image(array, Grid(shape, np.eye(len(shape) + 1)), ("a",)))
    windowing = Windowing(size=window, overlap=tuple(w // 2 for w in window), pad="constant")  # MONAI pads with 0
    infer(network, source, sink, classes=4, windowing=windowing)
    with torch.inference_mode():
        found = sliding_window_inference(
            torch.from_numpy(array)[None], window, 1, network, overlap=0.5, mode="gaussian"
        )
    theirs = np.asarray(found)[0]
    np.testing.assert_allclose(sink.array, theirs, atol=1e-6)
    assert (sink.array.argmax(0) == theirs.argmax(0)).all()
