"""The reversible inverted-bottleneck U-Net: what its note promises (no published numbers are known)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.reversible import Add
from medmamba.memory import measure
from medmamba.nets import network_class
from medmamba.nets.reversible_mbconv_unet import InvertedBottleneck, ReversibleMBConvUNet

SMALL: dict[str, Any] = {"in_channels": 2, "out_channels": 3, "widths": (4, 6), "depths": (1, 1), "expand": 2}


def small(memory: str = "stages", **settings: Any) -> ReversibleMBConvUNet:
    torch.manual_seed(0)
    return ReversibleMBConvUNet(ReversibleMBConvUNet.Config(**{**SMALL, **settings}), memory=memory)


def gradients(network: ReversibleMBConvUNet, space: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    scores = network(torch.randn(1, 2, *space))
    torch.nn.functional.cross_entropy(scores, torch.randint(0, 3, (1, *space))).backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(grads) == len(list(network.parameters()))
    return [scores.detach(), *grads]


@pytest.mark.parametrize("space", [(4, 6, 4), (5, 3, 7), (6, 8)])
def test_recomputed_gradients_are_the_stored_ones(space: tuple[int, ...]) -> None:
    rank: dict[str, Any] = {"spatial_dims": len(space)}
    found, truth = (gradients(small(memory, **rank), space) for memory in ("stages", "stored"))
    assert found[0].shape == (1, 3, *space)
    assert all(torch.equal(x, y) for x, y in zip(found, truth, strict=True))
    rank |= {"grid_bits": None, "widths": (16, 16)}  # a norm over two channels alone would magnify rounding
    plain = [gradients(small(memory, **rank), space) for memory in ("stages", "stored")]
    for x, y in zip(*plain, strict=True):
        assert float((x - y).norm()) <= 1e-4 * float(y.norm()) + 1e-6


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_couplings_are_undone(dtype: torch.dtype, near: float) -> None:
    """Plain couplings, to within 1e-5 in float32 as the note says."""
    network = small(grid_bits=None, depths=(3, 1), widths=(16, 16)).to(dtype)
    snap = network.grid()
    adds = [step for step in network.body.steps if isinstance(step, Add)][:6]
    start = tuple(torch.randn(1, 3, 4, 2, 8, dtype=dtype) for _ in range(2))
    state = start
    for step in adds:
        state = step(state, snap)
    for step in reversed(adds):
        state = step.inverse(state, snap)
    for x, y in zip(state, start, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=near)


def test_a_branch_is_the_inverted_bottleneck_of_the_note() -> None:
    """Norm and activation behind the expansion and the depthwise convolution, a norm and nothing more at the end."""
    torch.manual_seed(0)
    branch = InvertedBottleneck(4, 3, 2).double()
    x = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64)

    def normed(t: torch.Tensor) -> torch.Tensor:
        spread = t.var(dim=-1, keepdim=True, correction=0)
        return (t - t.mean(dim=-1, keepdim=True)) / (spread + 1e-5).sqrt()

    wide = F.silu(normed(x @ branch.expand.weight.T + branch.expand.bias))
    kernel, bias = branch.depthwise.weight, branch.depthwise.bias
    wide = F.silu(normed(F.conv3d(wide.movedim(-1, 1), kernel, bias, padding=1, groups=8).movedim(1, -1)))
    torch.testing.assert_close(branch(x), normed(wide @ branch.project.weight.T + branch.project.bias))


def test_memory_does_not_grow_with_the_number_of_blocks() -> None:
    image, labels = torch.randn(1, 2, 8, 8, 8), torch.randint(0, 3, (1, 8, 8, 8))
    costs = [measure(small(depths=(depth, 1)), image, labels) for depth in (1, 4)]
    assert costs[0].held == costs[1].held
    assert costs[1].peak == pytest.approx(costs[0].peak, rel=0.05)
    assert measure(small("stored", depths=(4, 1)), image, labels).peak > 2 * costs[1].peak


def test_table_errors_and_input() -> None:
    assert network_class("reversible_mbconv_unet") is ReversibleMBConvUNet
    for wrong in ({"widths": (3, 6)}, {"depths": (1,)}, {"spatial_dims": 4}, {"expand": 0}):
        with pytest.raises(ConfigError):
            small(**wrong)
    with pytest.raises(ShapeError, match=r"\(1, 1, 4, 4, 4\)"):
        small()(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(ConfigError, match="cannot be undone"):
        small("full")(torch.zeros(1, 2, 4, 4, 4))
