"""What a user needs to know about this machine: versions, devices, backends, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = ("medmamba", "torch", "monai", "nibabel", "rasterio", "mlflow", "prefect", "fastapi", "sqlalchemy")
EXTRAS = {"prefect_dask": "dask", "psycopg": "server", "triton": "triton"}


def findings() -> Iterator[tuple[str, str]]:
    """Pairs (what, finding), most important first."""
    yield "system", f"{platform.platform()}, Python {platform.python_version()}{_advice()}"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "missing; install with: pip install medmamba"
    yield from _hardware()
    from medmamba.ops.backend import backend_report

    yield "scan", ", ".join(f"{k} {v}" for k, v in backend_report().items())
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            yield module, f"not installed; optional: pip install 'medmamba[{extra}]'"


def _advice() -> str:
    system = platform.system()
    if system == "Windows":
        return " (not supported natively: run inside WSL)"
    return " (best effort; Linux is tested)" if system == "Darwin" else ""


def _hardware() -> Iterator[tuple[str, str]]:
    import torch

    yield "processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}"
    yield "free disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB here"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    else:
        yield "gpu", "none found: everything runs on the CPU"
