"""Networks of known layers, wired anyhow, streamed: sums over the whole image first where a norm wants them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medmamba import scratch
from medmamba.errors import ConfigError
from medmamba.stream_graph import moments
from medmamba.stream_plan import multiple, plan
from tests.medmamba.test_stream import Killed, streamed, whole


class UNet(nn.Module):
    """Strided down, transposed up, a norm after every convolution, skips joined."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.LeakyReLU(0.1, inplace=True))
        self.down = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), norm(8), nn.PReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8))
        self.up = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.down(fine)
        coarse = torch.relu(self.inner(coarse) + coarse)
        return self.head(torch.cat([self.up(coarse), fine], dim=1))


class Excited(nn.Module):
    """Channels weighed by the mean of the whole map, told in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.pool, self.gate, self.linear = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        one, two = self.gate(self.pool(y)).sigmoid(), self.linear(y.mean(dim=(2, 3)))[..., None, None].sigmoid()
        return self.out(y * one + y * two)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: UNet(lambda width: nn.InstanceNorm2d(width, affine=True)),
    "group norm": lambda: UNet(lambda width: nn.GroupNorm(2, width)),
    "batch norm": lambda: UNet(nn.BatchNorm2d),
    "norm of the image": lambda: nn.Sequential(nn.InstanceNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)),
    "pooled": lambda: nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(2, 3, 5, padding=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.GELU()
    ),
    "excited": Excited,
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    network = BODIES[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network.to(dtype).eval()


def bright(shape: tuple[int, ...]) -> np.ndarray:
    """A mean far from 0, as images have."""
    return np.random.default_rng(0).normal(30, 5, (2, *shape)).astype(np.float32)


def whole_padded(network: nn.Module, array: np.ndarray) -> np.ndarray:
    """As the network says of the image at a size that it takes."""
    sizes = array.shape[1:]
    pads = [(0, -n % m) for n, m in zip(sizes, multiple(network, len(sizes)), strict=True)]
    return whole(network, np.pad(array, [(0, 0), *pads], mode="edge"))[(slice(None), *map(slice, sizes))]


@pytest.mark.parametrize("name", BODIES)
def test_streamed_is_whole(name: str, tmp_path: Path) -> None:
    array = bright((33, 13))
    for dtype, bar, rows in ((torch.float32, 1e-5, 7), (torch.float32, 1e-5, 16), (torch.float64, 1e-12, 4)):  # issue 5
        network = made(name, dtype)
        found, full = streamed(network, array, tmp_path, rows)[0], whole_padded(network, array)
        assert np.abs(found - full).max() <= bar * np.abs(full).max(), (dtype, rows)
        assert (found.argmax(0) == full.argmax(0)).all()


def test_statistics_of_slabs_of_their_own_differ() -> None:
    network, array = made("instance norm"), bright((40, 20))
    array[:, :20] *= 2
    tiles = np.concatenate([whole(network, array[:, row : row + 10]) for row in range(0, 40, 10)], axis=1)
    full = whole(network, array)
    assert np.abs(tiles - full).max() > 1e-2 * np.abs(full).max()


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(3, 12), st.integers(1, 20), st.sampled_from(sorted(BODIES)))
def test_any_raster_streams(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, rows: int, name: str
) -> None:
    network, array = made(name, torch.float64), bright((height, width))
    if name in ("instance norm", "group norm"):
        array = bright((height + 8, width))  # of one value there is no spread
    found, _ = streamed(network, array, tmp_path_factory.mktemp("stream"), rows)
    full = whole_padded(network, array)
    assert np.abs(found - full).max() <= 1e-12 * np.abs(full).max()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_moments_are_those_of_the_whole_whatever_the_cut(first: int, second: int, seed: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).normal(1000, 1, (1, first + second, 4, 3)))
    count, mean, squares = moments(rows, None)
    assert torch.equal(moments(rows[:, first:], moments(rows[:, :first], None)), torch.stack([count, mean, squares]))
    spread, middle = torch.var_mean(rows.flatten(0, -2), 0, correction=0)
    torch.testing.assert_close(squares / count, spread, rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, middle, rtol=1e-14, atol=0)


def test_a_norm_outside_the_first_slab_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind every line of the journal in turn: sums carried on disk, identical scores, no slab twice."""
    network, array = made("instance norm"), bright((30, 12))
    straight, notes = streamed(network, array, tmp_path, 6)
    lines = 0

    def die(name: str, path: Path) -> None:
        nonlocal lines
        lines += 1
        if lines % 3 == 0:
            raise Killed

    monkeypatch.setattr(scratch, "step", die)
    deaths = 0
    while True:
        try:
            resumed, again = streamed(network, array, tmp_path, 6, key="case")
            break
        except Killed:
            deaths += 1
    assert deaths >= 4
    assert np.array_equal(resumed, straight)
    assert again.slabs + again.taken_over == notes.slabs


class Rowed(nn.Module):
    """Adds something that differs from row to row."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 2, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


class Looks(nn.Module):
    """Chooses its way by the size it is shown."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2] > 8 else -x


class Flat(nn.Module):
    """Lays the rows end to end."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).cumsum(2).view_as(x)


@pytest.mark.parametrize(
    ("network", "part"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), r"0 \(Conv2d\)"),
        (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), r"1 \(Upsample\)"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Flat()), r"1 \(Flat, .*flatten"),
        (nn.Sequential(nn.ReLU(), Looks()), r"1 \(Looks\).*depends on the size"),
        (Rowed(), "differs from row to row"),
        (nn.Sequential(nn.Conv2d(2, 2, 4, padding=1)), "maps"),
        (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(3)), r"1 \(AdaptiveAvgPool2d\)"),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else type(value[-1] if len(list(value)) else value).__name__
        if isinstance(value, nn.Sequential)
        else type(value).__name__
    ),
)
def test_what_cannot_stream_is_refused_by_name(network: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        plan(network, 2, (24, 8))
    assert "use windows" in str(caught.value)
