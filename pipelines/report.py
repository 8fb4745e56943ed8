"""One case told in plain JSON, written last: the report on disk is the only memory of what is done."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medmamba.bundle import Bundle
from medmamba.files import hash_json, write_json
from medmamba.ops.backend import backend_report

RESULT_VERSION = 1  # raised when our code changes outputs: every finished case is then due again


def case_key(contents: Mapping[str, str], bundle: Bundle, mode: str = "windows") -> str:
    """Hash of the contents by role (SHA-256), the bundle's id (task settings are in it), RESULT_VERSION, and the mode
    of inference: another mode is another result."""
    own = {} if mode == "windows" else {"mode": mode}
    return hash_json({"contents": dict(contents), "bundle": bundle.id, "version": RESULT_VERSION, **own})


@dataclass(frozen=True, kw_only=True)
class Report:
    """`status` "done" or "set_aside" (then `code` and `message`); `inputs` by role {path, size, sha256};
    `outputs` by file name {size, sha256}; `numbers` of the task; `run` what does not change the result."""

    case: str
    key: str
    status: str
    bundle: Mapping[str, str]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    code: str | None = None
    message: str | None = None
    group: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Atomically; what BIDS wants of a sidecar is added for tools that look for it: `Sources`, `GeneratedBy`, for
        inputs with a `uri` in their data set also that the labels lie on the grid of the first."""
        values = asdict(self)
        values["Sources"] = [v.get("uri", v["path"]) for v in self.inputs.values()]
        if uris := [v["uri"] for v in self.inputs.values() if "uri" in v]:
            values |= {"SpatialReference": uris[0], "Manual": False}
        values["GeneratedBy"] = [{"Name": "medmamba", "Version": version("medmamba")}]
        write_json(path, values)

    @classmethod
    def load(cls, path: Path) -> Report | None:
        """The report under `path`, or None when there is none that can be read (then the case is due)."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MiB; not that of the process which started it, as rusage has it."""
    status = Path("/proc/self/status")
    if status.exists():
        told = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(told["VmHWM"].split()[0]) / 2**10
    scale = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


@cache
def code_version() -> str:
    """Package version and, in a checkout, the commit."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version("medmamba")
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version('medmamba')}+{commit}" if commit else version("medmamba")


def machine() -> dict[str, Any]:
    """What the result was made on: for the report, never part of the key."""
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "scan": {k: v for k, v in backend_report().items() if k in ("backend", "isa", "fallback_reason", "cuda")},
    }
