"""torch.library sees one op: opcheck, compile, export, torch.func; and the library's build never stops a scan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medmamba.layers.ss2d import SS2D
from medmamba.ops import backend, scan_build
from medmamba.ops.scan import scan_sequential, selective_scan
from medmamba.ops.scan_op import scan_into_op, scan_op
from medmamba.ops.tripwire import NonFiniteError, tripwire


def arguments() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    draw = [torch.randn(*s, generator=g) for s in ((2, 8, 40), (2, 8, 40), (8, 4), (2, 4, 40), (2, 4, 40), (8,))]
    draw[2] = -draw[2].exp()
    return tuple(draw)


class Mixer(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return selective_scan(*args, delta_softplus=True) * 2


@pytest.mark.parametrize("name", backend.available_backends())
def test_opcheck(name: str) -> None:
    u, delta, A, B, C, D = (x.requires_grad_() for x in arguments())
    args = (u.mT, delta.mT.unsqueeze(1), None, A[None], B.mT[:, None, None], C.mT[:, None, None], D[None], None, None,
            None, 1, True, True, name)  # fmt: skip
    torch.library.opcheck(scan_op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_opcheck_of_the_adding_form() -> None:
    u, delta, A, B, C, D = arguments()
    args = (u.mT, delta.mT.unsqueeze(1), None, A[None], B.mT[:, None, None], C.mT[:, None, None], D[None], None, None,
            None, 0, True, torch.zeros(2, 40, 8), "auto")  # fmt: skip
    torch.library.opcheck(scan_into_op, args, test_utils=("test_schema", "test_faketensor"))


def test_compile_sees_one_op() -> None:
    args = arguments()
    compiled = torch.compile(Mixer(), backend="aot_eager", fullgraph=True)
    leaves = [[x.clone().requires_grad_() for x in args] for _ in range(2)]
    results = [Mixer()(*leaves[0]), compiled(*leaves[1])]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(y.square().sum(), x) for y, x in zip(results, leaves)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_export_sees_one_op() -> None:
    args = arguments()
    with torch.no_grad():
        program = torch.export.export(Mixer(), args)
        names = [str(node.target) for node in program.graph.nodes if "selective_scan" in str(node.target)]
        torch.testing.assert_close(program.module()(*args), Mixer()(*args))
    assert names == ["medmamba.selective_scan.default"]


def test_functional_gradient() -> None:
    args = arguments()
    found = torch.func.grad(lambda u: selective_scan(u, *args[1:], delta_softplus=True).square().sum())(args[0])
    exact = tuple(x.double() for x in args)
    truth = torch.func.grad(lambda u: scan_sequential(u, *exact[1:], delta_softplus=True).square().sum())(exact[0])
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing remembered of an earlier build (before and after)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend.native_isa.cache_clear()
    scan_build.library.cache_clear()
    yield tmp_path
    backend.native_isa.cache_clear()
    scan_build.library.cache_clear()


def test_no_compiler_falls_back_and_says_why(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh_library))
    monkeypatch.delenv("CXX", raising=False)
    report = backend.backend_report()
    assert report["backend"] == "torch"
    assert "no C++ compiler" in str(report["fallback_reason"])
    args = arguments()
    torch.testing.assert_close(selective_scan(*args), scan_sequential(*args), rtol=1e-4, atol=1e-4)
    with pytest.raises(backend.ConfigError, match="no C\\+\\+ compiler"):
        selective_scan(*args, backend="native")


def test_unusable_home_falls_back(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh_library / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_library / "file"))  # no folder can be made below a file
    report = backend.backend_report()
    assert report["backend"] == "torch"
    assert report["fallback_reason"]


def test_failing_compiler_falls_back(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh_library / "broken"
    broken.write_text("#!/bin/sh\necho 'cannot compile today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    report = backend.backend_report()
    assert "cannot compile today" in str(report["fallback_reason"])
    assert not list(fresh_library.rglob("*.so"))


class Faulty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


def test_tripwire_names_the_layer() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), Faulty()))
    with tripwire(network), pytest.raises(NonFiniteError, match=r"layer '1\.1'.*output") as caught:
        network(-torch.ones(2, 3))
    assert caught.value.layer == "1.1"
    with tripwire(network), pytest.raises(NonFiniteError, match="input"):
        network(torch.full((2, 3), float("nan")))


def test_tripwire_names_the_layer_with_the_scan() -> None:
    network = nn.Sequential(nn.Identity(), SS2D(8, state=2))
    x = torch.randn(1, 8, 4, 5, requires_grad=True)
    with tripwire(network):
        network(x).sum().backward()  # a sound network passes, forward and backward
    with torch.no_grad():
        network[1].A_logs[3] = float("nan")
    with tripwire(network), pytest.raises(NonFiniteError) as caught:
        network(x)
    assert caught.value.layer.startswith("1")


def test_tripwire_costs_nothing_outside() -> None:
    network = nn.Sequential(nn.ReLU(), Faulty())
    with tripwire(network):
        pass
    assert network(-torch.ones(2)).isinf().all()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.modules())
