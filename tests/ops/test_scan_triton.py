"""The Triton backend without a GPU: right numbers in the interpreter, machine code for a device that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medmamba.errors import ConfigError
from medmamba.ops import backend, scan_triton
from medmamba.ops.scan_inputs import ScanInputs

ROOT = Path(__file__).resolve().parents[2]


def test_numbers_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests/ops/interpreted_scan.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


class CompiledOnly:
    """Stands where a kernel is and compiles, for an H100, what a launch with these arguments would compile."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] > 0
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool, **named: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kinds = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int32: "*i32"}
        given = self.kernel.signature.bind(*args, **named).arguments
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr or given[p.name] is None}
        types = {
            name: "constexpr" if name in constants else kinds[x.dtype] if torch.is_tensor(x) else "i32"
            for name, x in given.items()
        }
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, types, constexprs=constants)
        self.made.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))


def scan_inputs(*, table: bool, rank: int, optional: bool, softplus: bool, kind: torch.dtype) -> ScanInputs:
    u, delta = torch.rand(1, 70, 4), torch.rand(1, 2, 70, rank or 4)
    A, B, one = -torch.rand(2, 4, 3), torch.rand(1, 2, 1, 70, 3), torch.rand(2, 4)
    order = torch.stack([torch.randperm(70, dtype=torch.int32) for _ in range(2)]) if table else None
    weight, extra = torch.rand(2, 4, rank) if rank else None, one if optional else None
    initial = torch.rand(1, 2, 4, 3) if optional else None
    inputs = ScanInputs(u, delta, weight, A, B, B, extra, extra, initial, order, 0 if table else 2, softplus)
    return inputs._replace(u=u.to(kind), delta=delta.to(kind), B=B.to(kind), C=B.to(kind))


WITHOUT, WITH = ({"table": x, "optional": x, "softplus": x} for x in (False, True))
CASES = [
    pytest.param(1, WITH | {"rank": 0, "kind": torch.float32}, id="one-stretch"),
    pytest.param(2048, WITH | {"rank": 3, "kind": torch.float32}, id="stretches-rank", marks=pytest.mark.slow),
    pytest.param(2048, WITHOUT | {"rank": 0, "kind": torch.float32}, id="bare", marks=pytest.mark.slow),
    pytest.param(1, WITH | {"rank": 3, "kind": torch.bfloat16}, id="half", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fill", "how"), CASES)
def test_machine_code_for_a_device_that_is_not_here(
    fill: int, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from medmamba.ops import scan_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(scan_triton, "FILL", fill)
    kernels = {name: CompiledOnly(getattr(scan_triton_kernels, name)) for name in ("forward_kernel", "backward_kernel",
                                                                                   "carry_kernel")}  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setattr(scan_triton_kernels, name, kernel)
    inputs = scan_inputs(**how)
    out = scan_triton.forward(inputs, save=True)
    scan_triton.backward(inputs, out.borders, torch.rand(1, 70, 4), None)
    made = [x for kernel in kernels.values() for x in kernel.made]
    assert len(made) >= (2 if fill == 1 else 8)
    for compiled in made:
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert "__local_depot" not in compiled.asm["ptx"]  # no tile is indexed out of registers


def test_it_is_asked_for_by_name_only_where_it_is() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        backend.resolve("triton", torch.zeros(1))
    assert "triton" not in backend.available_backends()
    assert backend.resolve("triton", torch.zeros(1, dtype=torch.float64)) == ("torch", "")


def test_without_triton_torch_serves_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton fails
    scan_triton.unavailable.cache_clear()
    like: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    try:
        assert backend.resolve("auto", like) == ("torch", "")
        with pytest.raises(ConfigError, match=r"medmamba\[triton\]"):
            backend.resolve("triton", like)
        assert backend.available_backends("cuda") == ("torch",)
    finally:
        scan_triton.unavailable.cache_clear()
