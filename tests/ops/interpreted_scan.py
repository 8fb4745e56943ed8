"""The Triton kernels on CPU tensors, in Triton's interpreter: the shared checks of the scan with tiny shapes.

Not collected by itself: test_scan_triton runs this file in a process of its own, because triton reads
TRITON_INTERPRET when it is imported. Every check runs with the positions in one stretch and cut into many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from medmamba.ops import backend, scan_triton
from medmamba.ops.scan import scan_sequential, selective_scan
from medmamba.ops.scan_directions import Direction, all_directions, selective_scan_directions
from medmamba.ops.scan_inputs import ScanInputs
from medmamba.ops.scan_op import scan_op
from tests.ops import test_scan, test_scan_directions

VALUE, GRADIENT = test_scan.VALUE, test_scan.GRADIENT


def row_by_row(self: Any, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """The interpreter's associative scan calls the kernels' `_then` for one element at a time; this takes rows."""
    decay, state = (np.moveaxis(x.handle.data, self.axis, 0).copy() for x in inputs)
    for i in range(1, len(decay)):
        state[i] += decay[i] * state[i - 1]
        decay[i] *= decay[i - 1]
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), tl.float32) for x in (decay, state)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", row_by_row)


@pytest.fixture(params=[1, scan_triton.FILL], ids=["one stretch", "many stretches"])
def fill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_triton, "FILL", request.param)


def test_it_is_triton_that_is_checked() -> None:
    assert "triton" in backend.available_backends()
    assert backend.resolve("triton", torch.zeros(1)) == ("triton", "")
    assert backend.resolve("auto", torch.zeros(1))[0] != "triton"  # nobody wants the interpreter by default


def test_rows_are_what_elements_are(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ScanInputs(*(x.float() if torch.is_tensor(x) else x for x in _small()))
    quick = scan_triton.forward(inputs, save=False).y
    monkeypatch.undo()
    assert torch.equal(quick, scan_triton.forward(inputs, save=False).y)


def _small() -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    u, delta, A, B = (torch.rand(s, generator=g) for s in ((1, 5, 2), (1, 1, 5, 2), (1, 2, 1), (1, 1, 1, 5, 1)))
    return u, delta, None, -A, B, B + 1, None, None, None, None, 1, True


@pytest.mark.usefixtures("fill")
@pytest.mark.parametrize(
    ("batch", "width", "length", "states", "groups", "optional", "softplus"),
    [(1, 2, 33, 2, 2, True, True), (1, 17, 33, 1, 1, False, True), (1, 1, 1, 3, 1, True, False)],
)
def test_equals_definition(
    batch: int, width: int, length: int, states: int, groups: int, optional: bool, softplus: bool
) -> None:
    args = test_scan.make(batch, width * groups, length, states, groups, 0, optional)
    if not softplus:
        args["delta"] = args["delta"].abs() * 0.3
        args.pop("delta_bias", None)
    test_scan.check(args, "triton", torch.float32, VALUE, GRADIENT, delta_softplus=softplus)


def test_many_states() -> None:
    args = test_scan.make(1, 2, 3, 17, 1, 0, True)
    test_scan.check(args, "triton", torch.float32, VALUE, GRADIENT, delta_softplus=True)


@pytest.mark.parametrize("reverse", [0, 1])
def test_carry_over_more_stretches_than_one_tile(reverse: int) -> None:
    from medmamba.ops.scan_triton_kernels import carry_kernel

    g, count = torch.Generator().manual_seed(0), 70
    A, sums = -torch.rand(1, 3, 2, generator=g), torch.rand(count, 16, generator=g)
    ends, found = torch.randn(count, 2, 16, generator=g), torch.zeros(count, 2, 16)
    order = list(range(count))[:: -1 if reverse else 1]
    found[order[0]] = state = torch.randn(2, 16, generator=g)
    carry_kernel[(2,)](A, ends, sums, found, 1, 1, 3, 16, 2, count, reverse, 32, 4)
    for s in order:
        torch.testing.assert_close(found[s, :, :3], state[:, :3])
        state = torch.nn.functional.pad(torch.exp(A[0].mT * sums[s, :3]), (0, 13)) * state + ends[s]


@pytest.mark.usefixtures("fill")
@pytest.mark.parametrize(
    ("space", "directions", "channels", "states", "rank"),
    [
        ((5, 7), all_directions(2), 2, 1, 1),
        ((3, 13), ((1, 1), (1, -1)), 3, 2, 0),
        ((2, 3, 4), ((0, -1), (1, 1)), 1, 1, 0),
    ],
)
def test_directions(
    space: tuple[int, ...], directions: tuple[Direction, ...], channels: int, states: int, rank: int
) -> None:
    args = test_scan_directions.make(space, len(directions), channels, states, 1, rank, 0)
    test_scan_directions.check(args, "triton", directions)


def test_any_route_by_table_with_rank() -> None:
    table = torch.stack([torch.randperm(35, generator=torch.Generator().manual_seed(k)) for k in range(2)])
    test_scan_directions.check(test_scan_directions.make((5, 7), 2, 2, 1, 1, 2, 0), "triton", table)


def test_strides_do_not_matter() -> None:
    args = {k: v.float() for k, v in test_scan.make(1, 3, 33, 1, 1, 0, True).items()}
    views = {k: torch.stack([v, v], -1)[..., 0] for k, v in args.items()}
    views["delta"] = args["delta"].mT.contiguous().mT
    sides = []
    for given in (args, views):
        leaves = {k: v.requires_grad_() for k, v in given.items()}
        y = selective_scan(**leaves, delta_softplus=True, backend="triton")
        sides.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b)
    test_scan.test_expanded_input_and_shared_tensor("triton")


def test_softplus_of_very_small_and_large_steps() -> None:
    steps = torch.tensor([-80.0, -30.0, -17.0, -10.0, -7.0, -1.0, 0.0, 1.0, 25.0, 90.0]).double()
    args = {"u": torch.ones(1, 1, 10).double(), "delta": steps[None, None], "A": -torch.ones(1, 1).double()}
    args |= {"B": torch.ones(1, 1, 10).double(), "C": torch.ones(1, 1, 10).double()}
    exact = scan_sequential(**args, delta_softplus=True)
    found = selective_scan(**{k: v.float() for k, v in args.items()}, delta_softplus=True, backend="triton")
    torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=0)  # relative: the smallest step counts too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    args = {k: v.to(dtype) for k, v in test_scan.make(1, 3, 34, 1, 1, 2, True).items()}
    sides = []
    for scan, kind, how in ((scan_sequential, torch.float64, {}), (selective_scan, dtype, {"backend": "triton"})):
        leaves = {k: v.to(kind).requires_grad_() for k, v in args.items()}
        y, last = scan(**leaves, delta_softplus=True, return_last_state=True, **how)
        sides.append((y, last, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    assert sides[1][1].dtype == torch.float32
    floor = max(x.abs().max() for x in sides[0][2:])
    for name, exact, found in zip(("y", "last", *args), *sides):
        assert found.dtype == (torch.float32 if name == "last" else dtype)
        assert (found - exact).abs().max() <= torch.finfo(dtype).eps * max(exact.abs().max(), floor), name


def test_state_is_carried_over_a_cut() -> None:
    args = {k: v.float() for k, v in test_scan.make(1, 2, 40, 1, 1, 1, False).items()}
    whole, end = selective_scan(**args, delta_softplus=True, return_last_state=True, backend="triton")
    state, found = torch.zeros(1, 2, 1), []
    for cut in (slice(0, 7), slice(7, 40)):
        part = {k: v[..., cut] if k != "A" else v for k, v in args.items()}
        y, state = selective_scan(
            **part, delta_softplus=True, initial_state=state, return_last_state=True, backend="triton"
        )
        found.append(y)
    torch.testing.assert_close(torch.cat(found, -1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks of NaN
@pytest.mark.parametrize(("name", "bad"), [("u", float("nan")), ("delta", float("nan")), ("delta", float("inf"))])
def test_nan_is_not_swallowed(name: str, bad: float) -> None:
    args = {k: v.float() for k, v in test_scan.make(1, 3, 9, 2, 1, 0, False).items()}
    args[name][0, 1, 7] = bad
    y = selective_scan(**args, delta_softplus=True, backend="triton")
    assert not y[0, 1, 7].isfinite()
    assert y[0, [0, 2]].isfinite().all()


def test_opcheck() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 2), (1, 1, 3, 2), (1, 2, 1), (1, 1, 1, 3, 1), (1, 1, 1, 3, 1))
    u, delta, A, B, C = (torch.rand(s, generator=g).requires_grad_() for s in shapes)
    args = (u, delta, None, A, B, C, None, None, None, None, 1, True, True, "triton")
    torch.library.opcheck(scan_op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.usefixtures("fill")
def test_added_into_a_map_that_is_there() -> None:
    args = {k: v.float() for k, v in test_scan_directions.make((3, 13), 2, 2, 1, 1, 0, 0).items()}
    how: dict[str, Any] = {"delta_softplus": True, "directions": ((1, 1), (0, 1)), "backend": "triton"}
    there = torch.ones_like(args["u"])
    y = selective_scan_directions(**args, **how)
    found = selective_scan_directions(**args, **how, into=there)
    assert found is there
    torch.testing.assert_close(found, y + 1)


def test_double_precision_goes_to_torch() -> None:
    assert backend.resolve("triton", torch.zeros(1, dtype=torch.float64)) == ("torch", "")
