"""selective_scan equals its sequential definition: every backend, values and gradients, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError
from medmamba.ops.backend import available_backends, backend_report, resolve
from medmamba.ops.scan import scan_sequential, selective_scan

BACKENDS = available_backends()
VALUE, GRADIENT = 1e-6, 2e-5  # max-norm relative to float64: the "must"


def make(
    batch: int, channels: int, length: int, states: int, groups: int, seed: int, optional: bool
) -> dict[str, Tensor]:
    """Arguments of one scan, float32 numbers held in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    args = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length) - 1,
        "A": -draw(channels, states).exp(),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
    }
    if optional:
        args |= {
            "D": draw(channels),
            "z": draw(batch, channels, length),
            "delta_bias": draw(channels),
            "initial_state": draw(batch, channels, states),
        }
    return args


def check(
    args: dict[str, Tensor], backend: str, dtype: torch.dtype, value: float, gradient: float, **flags: bool
) -> None:
    """Output, last state and all gradients of `backend` against the float64 definition."""
    sides = []
    for function, kind, extra in ((scan_sequential, torch.float64, {}), (selective_scan, dtype, {"backend": backend})):
        leaves = {name: x.to(kind).requires_grad_() for name, x in args.items()}
        y, last = function(**leaves, return_last_state=True, **flags, **extra)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=kind, device=x.device).reshape(x.shape) for x in (y, last)]
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        sides.append(((y, last), torch.autograd.grad(loss, list(leaves.values()))))
    (truth, truth_grads), (found, found_grads) = sides
    floor = 0.01 * max(x.abs().max() for x in truth_grads)
    for a, b in zip(truth, found):
        assert (a - b).abs().max() <= value * max(1e-3, a.abs().max())
    for name, a, b in zip(args, truth_grads, found_grads):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= gradient * max(a.abs().max(), floor), name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    width=st.sampled_from([1, 3, 8, 16, 19]),
    length=st.sampled_from([1, 2, 31, 32, 33, 65, 100]),
    states=st.sampled_from([1, 2, 3, 4, 7, 16]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    optional=st.booleans(),
    softplus=st.booleans(),
)
def test_equals_definition(
    backend: str,
    batch: int,
    width: int,
    length: int,
    states: int,
    groups: int,
    seed: int,
    optional: bool,
    softplus: bool,
) -> None:
    args = make(batch, width * groups, length, states, groups, seed, optional)
    if not softplus:
        args["delta"] = args["delta"].abs() * 0.3  # a step is positive
        args.pop("delta_bias", None)
    check(args, backend, torch.float32, VALUE, GRADIENT, delta_softplus=softplus)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 90), states=st.integers(1, 6), groups=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_double_precision_equals_definition(length: int, states: int, groups: int, seed: int) -> None:
    check(make(2, 6, length, states, groups, seed, True), "auto", torch.float64, 1e-12, 1e-11, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [(3, 1), (1, 2), (2, 3)])
def test_B_and_C_may_come_in_different_groups(backend: str, groups: tuple[int, int]) -> None:
    args = make(2, 6, 35, 4, groups[0], 5, True)
    args["C"] = make(2, 6, 35, 4, groups[1], 6, False)["C"]
    check(args, backend, torch.float32, VALUE, GRADIENT, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("states", [5, 64, 256])
def test_large_states(backend: str, states: int) -> None:
    check(make(1, 4, 40, states, 1, 0, True), backend, torch.float32, VALUE, GRADIENT, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_branches_and_extreme_steps(backend: str) -> None:
    args = make(1, 8, 50, 4, 1, 3, True)
    args["delta"][0, 0, :4] = torch.tensor([25.0, -30.0, 200.0, -100.0])
    check(args, backend, torch.float32, VALUE, GRADIENT, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    args = {k: v.float() for k, v in make(2, 24, 37, 4, 1, 0, True).items()}
    plain = selective_scan(**args, delta_softplus=True, backend=backend)
    odd = {k: torch.stack([v, v], -1)[..., 0] for k, v in args.items()}  # nothing contiguous
    odd["delta"] = args["delta"].mT.contiguous().mT  # channels last
    odd["B"] = args["B"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    leaves = {k: v.requires_grad_() for k, v in odd.items()}
    y = selective_scan(**leaves, delta_softplus=True, backend=backend)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    args = {k: v.clone().requires_grad_() for k, v in args.items()}
    wanted = torch.autograd.grad(
        selective_scan(**args, delta_softplus=True, backend=backend).sum(), list(args.values())
    )
    for a, b in zip(wanted, torch.autograd.grad(y.sum(), list(leaves.values()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_input_and_shared_tensor(backend: str) -> None:
    """u and delta one tensor, B and C one tensor, u expanded from one row: gradients add up."""
    row = torch.randn(1, 1, 20, requires_grad=True)
    A, BC = -torch.rand(16, 3), torch.randn(1, 3, 20, requires_grad=True)

    def loss(row: Tensor, BC: Tensor, **kind: str) -> Tensor:
        u = row.expand(1, 16, 20)
        scan = selective_scan if kind else scan_sequential
        return scan(u, u, A.to(row.dtype), BC, BC, delta_softplus=True, **kind).square().sum()

    found = torch.autograd.grad(loss(row, BC, backend=backend), [row, BC])
    exact = torch.autograd.grad(loss(row.double(), BC.double()), [row, BC])
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_carried_over_a_cut(backend: str) -> None:
    args = {k: v.float() for k, v in make(2, 16, 70, 4, 1, 1, True).items()}
    whole, end = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    timed = ("u", "delta", "B", "C", "z")
    first, state = selective_scan(
        **{k: v[..., :32] if k in timed else v for k, v in args.items()},
        delta_softplus=True, return_last_state=True, backend=backend,
    )  # fmt: skip
    args["initial_state"] = state
    second, last = selective_scan(
        **{k: v[..., 32:] if k in timed else v for k, v in args.items()},
        delta_softplus=True, return_last_state=True, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(backend: str, dtype: torch.dtype) -> None:
    args = {k: v.to(dtype) for k, v in make(1, 16, 64, 4, 1, 2, True).items()}
    y, last = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    exact = scan_sequential(**{k: v.double() for k, v in args.items()}, delta_softplus=True)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()  # one rounding of the output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_swallowed(backend: str, bad: float) -> None:
    for name in ("u", "delta"):
        args = {k: v.float() for k, v in make(1, 16, 40, 4, 1, 0, False).items()}
        args[name][0, 3, 7] = bad
        y = selective_scan(**args, delta_softplus=True, backend=backend)
        assert not y[0, 3, 7].isfinite()
        assert y[0, 4].isfinite().all()


def test_threads_do_not_change_the_result() -> None:
    args = {k: v.float() for k, v in make(1, 96, 300, 16, 1, 0, True).items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = {k: v.clone().requires_grad_() for k, v in args.items()}
            y = selective_scan(**leaves, delta_softplus=True)
            found.append((y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max()))


def test_used_twice_and_backward_after_no_grad_parts() -> None:
    args = {k: v.float().requires_grad_() for k, v in make(1, 8, 20, 2, 1, 0, False).items()}
    y = selective_scan(**args, delta_softplus=True)
    z = selective_scan(**(args | {"u": y}), delta_softplus=True)
    (y.sum() + z.sum()).backward()
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    y = scan_sequential(**exact, delta_softplus=True)
    (y.sum() + scan_sequential(**(exact | {"u": y}), delta_softplus=True).sum()).backward()
    for name, x in args.items():
        torch.testing.assert_close(x.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-4)


def test_unknown_backend_and_wrong_shape_are_named() -> None:
    args = make(1, 6, 5, 2, 2, 0, True)
    with pytest.raises(ConfigError, match="cuda9"):
        selective_scan(**{k: v.float() for k, v in args.items()}, backend="cuda9")
    for name in args:
        wrong = args | {name: args[name][..., None]}
        with pytest.raises(ShapeError):
            selective_scan(**wrong)
    with pytest.raises(ShapeError, match="do not divide"):
        selective_scan(**(args | {"B": args["B"].repeat(1, 2, 1, 1)}))


def test_report_and_resolution() -> None:
    report = backend_report()
    assert report["backend"] in ("native", "torch")
    assert (report["backend"] == "native") == (report["fallback_reason"] == "")
    assert resolve("native", torch.zeros(1, dtype=torch.float64)) == ("torch", "")
