"""The meters against bytes counted by hand, what a reversible body holds, and predictions against measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.memory import LiveBytes, choose_memory, held_bytes, largest_patch, measure, predict, without_data
from medmamba.nets.mamba_unet import MambaUNet

C, K = 8, 3


def config(**changes: Any) -> Any:
    small = {"spatial_dims": 2, "out_channels": K, "widths": (C, 2 * C), "depths": (1, 1), "mixer": "none", "state": 2}
    return MambaUNet.Config(**{**small, **changes})


def test_live_bytes_are_those_that_live_at_once() -> None:
    x = torch.zeros(256)  # 1 KiB
    with LiveBytes([x]) as live:
        y = x * 2
        z = y.view(16, 16).T  # the same storage
        del y
        w = z.exp()
        del z
        _ = w.add_(1), x.add_(1)
        v = w + 1
    assert live.peak() == 2048
    live.leave_out(v)
    assert live.peak() == 2048  # z and w were two before v was born
    live.leave_out(w)
    assert live.peak() == 1024


def test_held_bytes_are_those_that_autograd_saves_once_each() -> None:
    x = torch.zeros(256, requires_grad=True)
    with held_bytes([x]) as held:
        y = x.exp()  # saves its result
        z = y * y  # saves y again
        w = z * 2  # saves nothing
    assert held.bytes == 1024
    assert w.grad_fn is not None
    del y, z, w
    assert held.bytes == 0


def map_bytes(space: tuple[int, ...], batch: int = 1) -> int:
    return batch * C * torch.Size(space).numel() * 4


@pytest.mark.parametrize("mixer", ["none", "s6", "vssd"])
def test_a_body_holds_one_map_whatever_its_depth_and_levels(mixer: str) -> None:
    space, found = (16, 16), set()
    for levels, depth in ((1, 1), (2, 1), (3, 1), (2, 4)):
        widths = tuple(C * 2**i for i in range(levels))
        network = MambaUNet(config(widths=widths, depths=(depth,) * levels, mixer=mixer, mixer_from=0))
        network.body.head = None
        snap = network.grid()
        state = network.stem(torch.randn(1, 1, *space), snap)
        with held_bytes() as held:
            last = network.body(state, snap, "full")
        found.add(held.bytes)
        assert isinstance(last, tuple)
    assert found == {map_bytes(space)}


def test_the_network_with_its_loss_holds_little_more_and_stored_grows_with_depth() -> None:
    space, stored = (16, 16), []
    for depth in (1, 3):
        network = MambaUNet(config(depths=(depth, depth)))
        image, labels = torch.randn(1, 1, *space), torch.randint(0, K, (1, *space))
        assert measure(network, image, labels).held <= (1 + 2 * (K + 1) / C) * map_bytes(space)
        network.memory = "stored"
        stored.append(measure(network, image, labels))
    assert stored[1].held > 2 * stored[0].held
    assert stored[1].peak >= stored[1].held
    assert all(p.grad is None for p in network.parameters())


GRID: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "plane": ({}, (1, 1, 24, 24), "full"),
    "plane stored": ({}, (2, 1, 24, 24), "stored"),
    "plane stages": ({"depths": (2, 1)}, (1, 1, 24, 24), "stages"),
    "volume": ({"spatial_dims": 3}, (1, 1, 8, 12, 8), "full"),
    "volume stored": ({"spatial_dims": 3}, (2, 1, 8, 8, 8), "stored"),
    "flat strides": ({"spatial_dims": 3, "strides": ((1, 2, 2),)}, (1, 1, 4, 12, 8), "full"),
    "three levels": ({"widths": (8, 16, 32), "depths": (1, 1, 1), "in_channels": 4}, (1, 4, 32, 16), "full"),
    "wide": ({"widths": (32,), "depths": (1,)}, (1, 1, 16, 16), "full"),
    "s6": ({"mixer": "s6", "mixer_from": 0}, (1, 1, 16, 24), "full"),
    "vssd, odd size": ({"mixer": "vssd"}, (1, 1, 17, 23), "stored"),
    "split, inverted": ({"down": "split", "branch": "inverted"}, (1, 1, 24, 24), "full"),
    "twin": ({"down": "strided", "branch": "grouped"}, (1, 1, 24, 24), "stages"),
}


@pytest.mark.parametrize("name", GRID)
def test_predictions_are_within_15_percent_of_the_measurement(name: str) -> None:
    changes, shape, memory = GRID[name]
    torch.manual_seed(0)
    labels = torch.randint(0, K, (shape[0], *shape[2:]))
    found = measure(MambaUNet(config(**changes), memory=memory), torch.randn(shape), labels)
    told = predict(without_data(lambda: MambaUNet(config(**changes))), shape, memory=memory)
    assert told.peak == pytest.approx(found.peak, rel=0.15)
    assert told.held == pytest.approx(found.held, rel=0.15)
    assert told.weights == found.weights


def test_predictions_see_any_network_and_any_loss() -> None:
    class Unusual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real @ x.mT

    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Unusual())
    shape = (1, 1, 16, 16)
    found = measure(network, torch.randn(shape), torch.zeros(1, 16, 16), lambda y, t: (y - t).square().mean())
    told = predict(network.to("meta"), shape, loss=lambda y, t: (y - t).square().mean())
    assert told.peak == pytest.approx(found.peak, rel=0.15)


def test_the_fastest_mode_that_fits_is_chosen() -> None:
    network, shape = without_data(lambda: MambaUNet(config())), (1, 1, 16, 16)
    costs = {mode: predict(network, shape, memory=mode) for mode in network.modes}  # type: ignore[union-attr]
    for mode in ("stored", "stages"):
        assert choose_memory(network, shape, costs[mode].total) == (mode, costs[mode])
    assert choose_memory(network, shape, costs["stages"].total - 1) == ("full", costs["full"])
    assert choose_memory(without_data(lambda: MambaUNet(config(widths=(C,), depths=(1,)))), shape, 1)[0] == "full"


def test_the_largest_patch_fits_and_the_next_does_not() -> None:
    network = without_data(lambda: MambaUNet(config(widths=(C,), depths=(1,))))
    budget = predict(network, (1, 1, 7, 7)).total
    assert largest_patch(network, budget)[0] == (7, 7)
    assert largest_patch(network, budget, limit=(4, 64))[0] == (4, 12)  # 12 x 4 cells are 48, 7 x 7 are 49
    with pytest.raises(ConfigError, match="raise the budget"):
        largest_patch(network, 100)
