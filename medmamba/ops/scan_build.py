"""The native library of the scan: found in a per-user cache or compiled there at first use, never a reason to fail.

One library per instruction set; its file name carries a hash of source, flags and compiler, so an old one is never
loaded for new source. Built under a lock, written beside its name and renamed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("scan_kernel.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-w")
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}


class NativeUnavailableError(Exception):
    """Why there is no native library here; the next backend serves."""


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of this machine, widest first, as torch sees them."""
    known = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}
    return known.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))


def cache_folder() -> Path:
    """The user's own folder for built libraries."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "medmamba"


def find_compiler() -> str:
    """Path of a C++ compiler: $CXX, else the first of c++, g++, clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return str(Path(path).resolve())
    raise NativeUnavailableError("no C++ compiler found (tried $CXX, c++, g++, clang++)")


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """The loaded library of one instruction set. Raises NativeUnavailableError with the reason."""
    try:
        return ctypes.CDLL(str(_built(isa)))
    except OSError as error:
        raise NativeUnavailableError(f"{isa}: {error}") from error


def _built(isa: str) -> Path:
    """The library's file, compiled if it is not in the cache yet."""
    compiler = find_compiler()
    stamp = Path(compiler).stat()
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((FLAGS, ISA_FLAGS[isa], compiler, stamp.st_size, stamp.st_mtime_ns)).encode())
    folder = cache_folder()
    target = folder / f"scan-{isa}-{key.hexdigest()[:20]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat().st_uid
    if hasattr(os, "getuid") and owner != os.getuid():
        raise NativeUnavailableError(f"{folder} belongs to user {owner}; libraries are only loaded from the user's own")
    if not target.exists():
        with (folder / "build.lock").open("w") as lock:
            _lock(lock.fileno())
            if not target.exists():
                _compile(compiler, isa, target)
    return target


def _lock(descriptor: int) -> None:
    """Wait for the other builders; the lock falls with the file."""
    try:
        import fcntl
    except ImportError:  # not a POSIX machine: the rename keeps two builders apart
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _compile(compiler: str, isa: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / "scan.so"
        command = [compiler, *FLAGS, *ISA_FLAGS[isa], str(SOURCE), "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"{compiler} took more than 300 s") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise NativeUnavailableError(f"{compiler} failed for {isa}: {lines[0][:300]}")
        output.replace(target)
