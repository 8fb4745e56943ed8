"""The fast forms of ssd, s4d and gla equal their sequential definitions, values and gradients, any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medmamba.errors import ShapeError
from medmamba.ops import gla, s4d, ssd

SHAPES = {"batch": st.integers(1, 2), "length": st.integers(1, 70), "groups": st.sampled_from([1, 2]),
          "width": st.integers(1, 5), "states": st.integers(1, 6), "seed": st.integers(0, 99)}  # fmt: skip


def _agree(fast: Callable[..., object], slow: Callable[..., object], inputs: list[Tensor]) -> None:
    """Values and gradients of two functions of the same float64 tensors; 1e-10 is a few hundred roundings."""
    sides = []
    for function in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in outputs)
        sides.append((outputs, torch.autograd.grad(loss, leaves)))
    for a, b in zip(*sides):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def _ssd_inputs(batch: int, length: int, groups: int, width: int, states: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads = 2 * groups

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": draw(batch, length, heads, width),
        "dt": torch.nn.functional.softplus(draw(batch, length, heads)),
        "A": -draw(heads).exp() * 3,
        "B": draw(batch, length, groups, states),
        "C": draw(batch, length, groups, states),
        "state": draw(batch, heads, width, states),
        "dt_back": torch.nn.functional.softplus(draw(batch, length, heads)),
        "B_back": draw(batch, length, groups, states),
        "C_back": draw(batch, length, groups, states),
        "diagonal": draw(batch, length, heads),
    }


@settings(max_examples=12, deadline=None)
@given(**SHAPES)
def test_ssd_equals_definition(**shape: int) -> None:
    v = _ssd_inputs(**shape)
    _agree(ssd.ssd, ssd.ssd_sequential, [v[k] for k in ("x", "dt", "A", "B", "C", "state")])
    _agree(lambda *a: ssd.ssd(*a, chunk=7), ssd.ssd_sequential, [v[k] for k in ("x", "dt", "A", "B", "C")])


@settings(max_examples=8, deadline=None)
@given(**SHAPES)
def test_noncausal_and_quasiseparable_equal_definition(**shape: int) -> None:
    v = _ssd_inputs(**shape)
    _agree(ssd.ssd_noncausal, ssd.ssd_noncausal_sequential, [v[k] for k in ("x", "dt", "B", "C")])
    names = ("x", "dt", "dt_back", "A", "B", "B_back", "C", "C_back", "diagonal", "state")

    def paired(mixer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, df, db, A, Bf, Bb, Cf, Cb, e, s: mixer(x, (df, db), A, (Bf, Bb), (Cf, Cb), e, s)

    _agree(paired(ssd.quasiseparable), paired(ssd.quasiseparable_sequential), [v[k] for k in names])


def test_ssd_carries_its_state_over_a_cut() -> None:
    v = _ssd_inputs(2, 50, 2, 3, 4, 0)
    whole, last = ssd.ssd(v["x"], v["dt"], v["A"], v["B"], v["C"], v["state"])
    first, state = ssd.ssd(v["x"][:, :21], v["dt"][:, :21], v["A"], v["B"][:, :21], v["C"][:, :21], v["state"])
    second, end = ssd.ssd(v["x"][:, 21:], v["dt"][:, 21:], v["A"], v["B"][:, 21:], v["C"][:, 21:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_segment_sums_keep_small_sums_after_large_ones() -> None:
    """1e8 before the stretch would cost a difference of cumulative sums every digit in float32."""
    sums = ssd.segment_sums(torch.tensor([-1e8, -0.1, -0.2]))
    assert sums[2, 0] == pytest.approx(-0.3, rel=1e-6)
    assert sums[0, 1] == -torch.inf


def test_ssd_names_the_wrong_shape() -> None:
    v = _ssd_inputs(1, 5, 1, 2, 3, 0)
    with pytest.raises(ShapeError, match="dt has shape"):
        ssd.ssd(v["x"], v["dt"][:, :4], v["A"], v["B"], v["C"])


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 90), states=st.integers(1, 5), seed=st.integers(0, 99))
def test_s4d_kernel_and_fft_equal_recurrence(length: int, states: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(2, 3, length, generator=g, dtype=torch.float64)
    real, imag = (torch.randn(3, states, generator=g, dtype=torch.float64) for _ in range(2))
    dt = torch.rand(3, generator=g, dtype=torch.float64) + 0.01

    def fast(u: Tensor, real: Tensor, imag: Tensor, dt: Tensor) -> Tensor:
        return s4d.fft_convolve(
            u, s4d.s4d_kernel(torch.complex(imag, real), torch.complex(-real.exp(), imag), dt, length)
        )

    def slow(u: Tensor, real: Tensor, imag: Tensor, dt: Tensor) -> Tensor:
        return s4d.s4d_sequential(u, torch.complex(imag, real), torch.complex(-real.exp(), imag), dt)

    _agree(fast, slow, [u, real, imag, dt])
    _agree(s4d.fft_convolve, s4d.convolve_sequential, [u, torch.randn(3, length, generator=g, dtype=torch.float64)])


def test_s4d_kernel_keeps_its_phase_in_single_precision() -> None:
    """At l = 4000 a phase computed in float32 would be wrong in the third digit."""
    imag = torch.pi * torch.arange(16.0, dtype=torch.float64)[None] + 1
    A, C, dt = (
        torch.complex(torch.full_like(imag, -1e-4), imag),
        torch.ones(1, 16, dtype=torch.complex128),
        torch.ones(1),
    )
    exact = s4d.s4d_kernel(C, A.to(torch.complex64).to(torch.complex128), dt.double(), 4000)
    single = s4d.s4d_kernel(C.to(torch.complex64), A.to(torch.complex64), dt, 4000)
    assert (single - exact).abs().max() < 2e-5 * exact.abs().max()


@settings(max_examples=10, deadline=None)
@given(
    length=st.integers(1, 50), keys=st.integers(1, 4), values=st.integers(1, 4), strength=st.sampled_from([0.1, 30.0])
)
def test_gla_equals_definition(length: int, keys: int, values: int, strength: float) -> None:
    g = torch.Generator().manual_seed(length)
    q, k, ahead, back = (torch.randn(2, 2, length, keys, generator=g, dtype=torch.float64) for _ in range(4))
    v = torch.randn(2, 2, length, values, generator=g, dtype=torch.float64)
    gates = [torch.nn.functional.logsigmoid(x) * strength for x in (ahead, back)]
    _agree(gla.gla, gla.gla_sequential, [q, k, v, gates[0]])
    _agree(gla.gla_bidirectional, gla.gla_bidirectional_sequential, [q, k, v, *gates])


@pytest.mark.parametrize("length", [1, 31, 32, 70])
@pytest.mark.parametrize("floor", [-0.01, -1.8])  # 32 gates of -1.8 sum to -58
def test_gla_with_bounded_gates_equals_definition(length: int, floor: float) -> None:
    g = torch.Generator().manual_seed(length)
    q, k, raw = (torch.randn(2, 2, length, 3, generator=g, dtype=torch.float64) for _ in range(3))
    v = torch.randn(2, 2, length, 4, generator=g, dtype=torch.float64)
    gates = floor * raw.abs().clamp(max=1)
    _agree(lambda *a: gla.gla_bounded(*a)[0], gla.gla_sequential, [q, k, v, gates])
    single = gla.gla_bounded(*(x.float() for x in (q, k, v, gates)))[0]
    torch.testing.assert_close(single.double(), gla.gla_sequential(q, k, v, gates), rtol=1e-4, atol=1e-5)


def test_gla_names_the_wrong_shape() -> None:
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ShapeError, match="log_gate"):
        gla.gla(q, q, q, q[:, :, :3])
