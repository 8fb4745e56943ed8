"""The scan on a real CUDA device: the shared checks at sizes a GPU likes. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from medmamba.ops.backend import available_backends, backend_report, resolve
from medmamba.ops.scan import selective_scan
from medmamba.ops.scan_directions import all_directions, selective_scan_directions
from tests.ops import test_scan, test_scan_directions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BACKENDS = available_backends("cuda") if torch.cuda.is_available() else ("none",)


def on_gpu(args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in args.items()}


def test_triton_serves_cuda() -> None:
    pytest.importorskip("triton")
    assert resolve("auto", torch.zeros(1, device="cuda")) == ("triton", "")
    assert backend_report()["cuda"] == "triton"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "width", "length", "states", "groups"),
    [(1, 1, 1, 1, 1), (2, 19, 100, 7, 2), (1, 96, 3000, 16, 1), (64, 192, 300, 1, 1), (1, 4, 40, 256, 1)],
)
def test_equals_definition(backend: str, batch: int, width: int, length: int, states: int, groups: int) -> None:
    args = on_gpu(test_scan.make(batch, width * groups, length, states, groups, 0, True))
    test_scan.check(args, backend, torch.float32, test_scan.VALUE, test_scan.GRADIENT, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    args = {k: v.to(dtype) for k, v in on_gpu(test_scan.make(2, 48, 500, 8, 1, 2, True)).items()}
    y, last = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    exact = selective_scan(**{k: v.double() for k, v in args.items()}, delta_softplus=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("space", "channels", "states", "groups", "rank"),
    [((40, 37), 48, 16, 1, 3), ((56, 56), 96, 1, 1, 6), ((9, 10, 11), 20, 3, 2, 0), ((1, 9), 2, 1, 1, 1)],
)
def test_directions(backend: str, space: tuple[int, ...], channels: int, states: int, groups: int, rank: int) -> None:
    directions = all_directions(len(space))
    args = on_gpu(test_scan_directions.make(space, len(directions), channels, states, groups, rank, 0))
    test_scan_directions.check(args, backend, directions)


def test_the_same_bits_twice() -> None:
    """No atomics: sums are taken in one order."""
    args = {k: v.float() for k, v in on_gpu(test_scan_directions.make((48, 48), 4, 96, 8, 1, 6, 0)).items()}
    sides = []
    for _ in range(2):
        leaves = {k: v.clone().requires_grad_() for k, v in args.items()}
        y = selective_scan_directions(**leaves, delta_softplus=True, directions=all_directions(2))
        sides.append((y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    for a, b in zip(*sides):
        assert torch.equal(a, b)


def test_more_elements_than_32_bits_count() -> None:
    """Offsets past 2^31 elements: the end of a long map equals the same piece scanned from its state."""
    length, channels = (1 << 31) // 64 + 4096, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("wants 40 GiB of GPU memory")
    u = torch.rand(1, channels, 1, device="cuda").expand(1, channels, length).mT.contiguous().mT
    A, BC = -torch.rand(channels, 1, device="cuda"), torch.rand(1, 1, length, device="cuda")
    y = selective_scan(u, u, A, BC, BC)
    tail = slice(length - 6000, length)  # the state has forgotten what came before
    short = selective_scan(u[..., tail], u[..., tail], A, BC[..., tail], BC[..., tail])
    torch.testing.assert_close(y[..., -1000:], short[..., -1000:], rtol=1e-4, atol=1e-4)
