"""Which form of the scan serves: the native kernel on the CPU, Triton on a CUDA device, pure torch everywhere else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from medmamba.errors import ConfigError
from medmamba.ops import scan_fallback, scan_native, scan_triton
from medmamba.ops.scan_build import NativeUnavailableError, library, supported_isas
from medmamba.ops.scan_inputs import ScanInputs

BACKENDS = ("auto", "native", "torch", "triton")


@functools.cache
def native_isa() -> tuple[str | None, str]:
    """The instruction set whose library is loaded, or None; and the reason when there is none."""
    reasons = []
    for isa in supported_isas():
        try:
            library(isa)
            _self_check(isa)
        except (NativeUnavailableError, OSError) as error:
            reasons.append(str(error))
        else:
            return isa, ""
    return None, "; ".join(dict.fromkeys(reasons))


def _self_check(isa: str) -> None:
    """One small scan, forward and backward, against the torch form: a miscompiled library must not serve."""
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(s, generator=g) for s in ((1, 40, 19), (1, 1, 40, 19), (1, 19, 5), (1, 1, 1, 40, 5))]
    u, delta, A, B = draws
    inputs = ScanInputs(u, delta, None, -A.exp(), B, B.flip(3), A[..., 0], A[..., 1], None, None, 1, True)
    truth, found = scan_fallback.forward(inputs, save=True), scan_native.forward(inputs, save=True, isa=isa)
    pairs = [(truth.y, found.y), (truth.last, found.last)]
    pairs += zip(
        scan_fallback.backward(inputs, truth.borders, u, None),
        scan_native.backward(inputs, found.borders, u, None, isa=isa),
    )
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs):
        raise NativeUnavailableError(f"{isa}: the compiled kernel gave wrong numbers in its self-check")


def resolve(backend: str, like: Tensor) -> tuple[str, str]:
    """Backend and instruction set ("" unless native) that serve a tensor like `like`.

    float64 is served by torch whatever is asked, and so are devices that are neither CPU nor CUDA. `native` is one
    instruction set chosen by the machine; "native:avx2" and the like ask for one. Raises ConfigError for an unknown
    name, or when `native` or `triton` is asked for by name and is not there.
    """
    name, _, isa = backend.partition(":")
    if name not in BACKENDS or (isa and isa not in supported_isas()):
        raise ConfigError(f"unknown scan backend {backend!r}; known here: {', '.join(available_backends())}, auto")
    if name == "torch" or like.dtype == torch.float64:
        return "torch", ""
    if name == "triton" or (name == "auto" and like.device.type == "cuda"):
        reason = scan_triton.unavailable(like.device.type)
        if reason and name == "triton":
            raise ConfigError(f"scan backend 'triton' is not available: {reason}; use 'auto' or 'torch'")
        return ("torch" if reason else "triton"), ""
    if like.device.type != "cpu":
        return "torch", ""
    if isa:
        return "native", isa
    found, reason = native_isa()
    if found is not None:
        return "native", found
    if name == "native":
        raise ConfigError(f"scan backend 'native' is not available: {reason}; use 'auto' or 'torch'")
    return "torch", ""


def available_backends(device: str = "cpu") -> tuple[str, ...]:
    """Names that `selective_scan(backend=...)` takes for tensors on `device` here, one for each instruction set."""
    native = supported_isas() if device == "cpu" and native_isa()[0] is not None else ()
    triton = () if scan_triton.unavailable(device) else ("triton",)
    return ("torch", *(f"native:{isa}" for isa in native), *triton)


def backend_report() -> dict[str, str | int]:
    """What serves float32 scans on the CPU here, with instruction set, threads and why not native; what on CUDA."""
    found, reason = native_isa()
    return {
        "backend": "native" if found else "torch",
        "isa": found or torch.backends.cpu.get_cpu_capability().lower(),
        "threads": torch.get_num_threads(),
        "fallback_reason": reason,
        "cuda": _on_cuda(),
    }


def _on_cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    reason = scan_triton.unavailable("cuda")
    return f"torch ({reason})" if reason else "triton"
