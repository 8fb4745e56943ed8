"""A sweep in pieces equals its definition: values, gradients, a graph used twice, and the state it begins in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medmamba.layers.mixers import GLA
from medmamba.memory import measure
from medmamba.ops.gla import gla_bounded, gla_sequential
from medmamba.ops.sweep import sweep, sweep_sequential


def cell(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A leaky sum (B, D), read by every position through a nonlinearity of its own."""
    mixed = torch.tanh(x @ weight + state[:, None])
    return mixed * x, 0.5 * state + mixed.sum(1)


def leaves(batch: int, length: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = ((batch, length, 3), (batch, 3), (3, 3))
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 2), length=st.integers(1, 12), piece=st.integers(1, 5))
def test_a_sweep_is_its_definition_and_its_graph_can_be_used_twice(batch: int, length: int, piece: int) -> None:
    tensors = leaves(batch, length)
    fast, slow = (f(cell, *tensors, length=piece) for f in (sweep, sweep_sequential))
    assert torch.equal(fast, slow)
    weights = torch.linspace(-1, 1, fast.numel(), dtype=fast.dtype).view(3, length, batch).permute(2, 1, 0)  # strided
    truth = torch.autograd.grad(slow, tensors, weights)
    for keep in (True, False):
        for x, y in zip(torch.autograd.grad(fast, tensors, weights, retain_graph=keep), truth, strict=True):
            torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(fast, tensors, weights)


def test_one_weight_in_two_sweeps_gets_both_gradients_and_no_second_derivative() -> None:
    x, state, weight = leaves(2, 7)
    found, truth = (
        torch.autograd.grad(f(cell, f(cell, x, state, weight, length=3), state, weight, length=2).sum(), weight)[0]
        for f in (sweep, sweep_sequential)
    )
    torch.testing.assert_close(found, truth)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(sweep(cell, x, state, weight).sum(), weight, create_graph=True)


@pytest.mark.parametrize("cut", [1, 40, 600])
def test_gla_carries_its_state_over_a_cut(cut: int) -> None:
    """700 positions are 22 chunks of 32: more than one group of chunks."""
    g = torch.Generator().manual_seed(cut)
    q, k, v, raw = (torch.randn(1, 2, 700, 3, generator=g, dtype=torch.float64) for _ in range(4))
    parts = (q, k, v, raw.clamp(max=0) / 2)
    first, state = gla_bounded(*(t[:, :, :cut] for t in parts))
    second, _ = gla_bounded(*(t[:, :, cut:] for t in parts), state)
    torch.testing.assert_close(torch.cat([first, second], dim=2), gla_sequential(*parts))


def test_the_gla_mixer_takes_the_memory_of_a_piece() -> None:
    """Keys, gates, decays and states of both directions at once were 40 maps of the mixer's width."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = GLA(8, state=8, route="raster")

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(x.movedim(1, -1)).movedim(-1, 1)

    image = torch.randn(1, 8, 16, 512)  # 4 pieces
    cost = measure(Scores(), image, torch.randint(0, 8, (1, 16, 512)))
    assert cost.held < 8 * image.nbytes
    assert cost.peak < 16 * image.nbytes
