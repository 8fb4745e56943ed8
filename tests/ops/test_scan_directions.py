"""Directions over one map equal copy, scan, merge; gradients too; any axis, sign, route, stride."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.backend import available_backends
from medmamba.ops.scan_directions import (
    all_directions,
    direction_order,
    scan_directions_sequential,
    selective_scan_directions,
)

BACKENDS = available_backends()


def make(
    space: tuple[int, ...], count: int, channels: int, states: int, groups: int, rank: int, seed: int
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    grouped = (groups,) if groups > 1 else ()
    args = {
        "u": draw(2, *space, channels),
        "delta": draw(2, count, *space, rank or channels) - 1,
        "A": -draw(count, channels, states).exp(),
        "B": draw(2, count, *grouped, *space, states),
        "C": draw(2, count, *grouped, *space, states),
        "D": draw(count, channels),
        "delta_bias": draw(count, channels),
        "initial_state": draw(2, count, channels, states),
    }
    return args | ({"delta_weight": draw(count, channels, rank)} if rank else {})


def check(args: dict[str, Tensor], backend: str, directions: object, dtype: torch.dtype = torch.float32) -> None:
    sides = []
    for function, kind, extra in (
        (scan_directions_sequential, torch.float64, {}),
        (selective_scan_directions, dtype, {"backend": backend, "return_last_state": True}),
    ):
        leaves = {k: v.to(kind).requires_grad_() for k, v in args.items()}
        y, last = function(**leaves, delta_softplus=True, directions=directions, **extra)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=kind, device=x.device).reshape(x.shape) for x in (y, last)]
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        sides.append((y, last, *torch.autograd.grad(loss, list(leaves.values()))))
    floor = 0.01 * max(x.abs().max() for x in sides[0][2:])
    for name, a, b in zip(("y", "last", *args), *sides):
        limit = 1e-6 * a.abs().max() if name in ("y", "last") else 2e-5 * max(a.abs().max(), floor)
        assert (a - b).abs().max() <= limit, name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    space=st.sampled_from([(1,), (40,), (5, 7), (1, 9), (3, 4, 5)]),
    channels=st.sampled_from([2, 8, 16, 20]),
    states=st.sampled_from([1, 3, 4]),
    groups=st.sampled_from([1, 2]),
    rank=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_equals_copy_scan_merge(
    backend: str, space: tuple[int, ...], channels: int, states: int, groups: int, rank: int, seed: int
) -> None:
    directions = all_directions(len(space))
    check(make(space, len(directions), channels, states, groups, rank, seed), backend, directions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("directions", [[(0, 1)], [(1, -1)], [(1, 1), (1, -1)], [(0, -1), (1, 1), (0, -1)]])
def test_subsets(backend: str, directions: list[tuple[int, int]]) -> None:
    check(make((6, 9), len(directions), 16, 2, 1, 0, 0), backend, directions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_route_by_table(backend: str) -> None:
    table = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(k)) for k in range(3)])
    check(make((5, 6), 3, 8, 4, 1, 2, 0), backend, table)


def test_double_precision() -> None:
    check(make((4, 5), 4, 6, 3, 2, 2, 0), "auto", all_directions(2), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_first_views_are_taken_as_they_are(backend: str) -> None:
    args = {k: v.float() for k, v in make((6, 7), 4, 16, 4, 1, 0, 0).items()}
    plain = selective_scan_directions(**args, delta_softplus=True, directions=all_directions(2), backend=backend)
    args["u"] = args["u"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    args["delta"] = args["delta"].permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    view = selective_scan_directions(**args, delta_softplus=True, directions=all_directions(2), backend=backend)
    torch.testing.assert_close(view, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(backend: str, dtype: torch.dtype) -> None:
    """16-bit map, float32 parameters and state; both memory layouts; gradients come in the dtype of their input."""
    big = ("u", "delta", "B", "C")
    args = {k: v.to(dtype) if k in big else v.float() for k, v in make((5, 13), 4, 24, 3, 1, 0, 0).items()}
    wide = {k: v.double().requires_grad_() for k, v in args.items()}
    exact, _ = scan_directions_sequential(**wide, delta_softplus=True, directions=all_directions(2))
    wanted = torch.autograd.grad(exact.square().sum(), list(wide.values()))
    for first in (False, True):
        leaves = dict(args)
        if first:
            leaves |= {k: v.movedim(-1, 1).contiguous().movedim(1, -1) for k, v in args.items() if k in big}
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
        y = selective_scan_directions(**leaves, delta_softplus=True, directions=all_directions(2), backend=backend)
        assert y.dtype == dtype
        assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()  # one rounding of the output
        grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
        for x, found, truth in zip(leaves.values(), grads, wanted):
            assert found.dtype == x.dtype
            assert (found - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_float16_number_is_read_exactly(backend: str) -> None:
    """Zero state and C, D = 1: y is u, bit for bit, subnormals and infinities included."""
    u = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, -1, 64)
    zero = torch.zeros(1, 1, u.shape[1], 64, dtype=torch.float16)
    B = zero[..., :2]
    y = torch.zeros(u.shape)
    finite = torch.where(u.isfinite(), u, 0)
    selective_scan_directions(
        finite, zero, -torch.ones(1, 64, 2), B, B, torch.ones(1, 64), directions=[(0, 1)], into=y, backend=backend
    )
    assert torch.equal(y, finite.float())
    y = selective_scan_directions(
        u, zero, -torch.ones(1, 64, 2), B, B, torch.ones(1, 64), directions=[(0, 1)], backend=backend
    )
    assert not y[~u.isfinite()].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_added_into_a_given_map(backend: str, dtype: torch.dtype) -> None:
    args = {k: v.to(dtype) for k, v in make((6, 7), 4, 24, 3, 2, 2, 0).items()}
    how = {"delta_softplus": True, "directions": all_directions(2), "backend": backend, "return_last_state": True}
    y, last = selective_scan_directions(**args, **how)
    start = torch.randn(y.shape, dtype=dtype)
    into = start.clone()
    result, state = selective_scan_directions(**args, **how, into=into)
    assert result is into
    torch.testing.assert_close(into, start + y)
    torch.testing.assert_close(state, last)
    leaf = start.clone().requires_grad_()
    args["u"].requires_grad_()
    result, _ = selective_scan_directions(**args, **how, into=leaf * 2)
    torch.testing.assert_close(result, 2 * start + y)
    assert torch.equal(torch.autograd.grad(result.sum(), leaf, retain_graph=True)[0], torch.full_like(start, 2))
    assert torch.autograd.grad(result.sum(), args["u"])[0].abs().sum() > 0


def test_orders_are_the_known_four_and_six() -> None:
    assert all_directions(2) == ((1, 1), (0, 1), (1, -1), (0, -1))
    assert direction_order((2, 3), (1, 1)).tolist() == [0, 1, 2, 3, 4, 5]
    assert direction_order((2, 3), (0, 1)).tolist() == [0, 3, 1, 4, 2, 5]
    assert direction_order((2, 3), (0, -1)).tolist() == [5, 2, 4, 1, 3, 0]
    assert len({tuple(direction_order((2, 3, 4), d).tolist()) for d in all_directions(3)}) == 6


def test_faults_are_named() -> None:
    args = make((3, 4), 2, 4, 2, 1, 0, 0)
    with pytest.raises(ConfigError, match="axis"):
        selective_scan_directions(**args, directions=[(2, 1), (0, 1)])
    with pytest.raises(ShapeError, match="K = 1"):
        selective_scan_directions(**args, directions=[(0, 1)])
    with pytest.raises(ShapeError, match="table"):
        selective_scan_directions(**args, directions=torch.zeros(2, 5))
    for name in args:
        with pytest.raises(ShapeError):
            selective_scan_directions(**(args | {name: args[name][..., None]}), directions=[(0, 1), (1, 1)])
