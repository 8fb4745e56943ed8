"""A golden case: what someone else's code computed, as arrays, and what an adapter makes of it.

Key format of an npz: `param:`, `in:`, `out:`, `cot:`, `grad:in:`, `grad:param:`, `ref:` + name, `gradnorm_names`,
`gradnorm_values`, `hparams` (one JSON string).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Max error over max entry allowed in float32 where the case holds float64 numbers (10 x what the SPEC measured).

    `ill_conditioned` is the float64 bound where the SPEC says that 1e-6 cannot be reached. `noisy`: rounding alone
    moves this network by more than the conventions allow (it changes with the number of threads), so that in float32
    too counts what float32 does to our own result (where the case holds float64 numbers: what a few roundings of inputs
    and parameters do to it).
    """

    output: float = 1e-5
    gradient: float = 1e-4
    ill_conditioned: float | None = None
    noisy: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """What an adapter gives: a function from named inputs to named outputs and the parameters under official names.

    `loss_outputs` names the outputs that enter the mean-square loss (None: all floating ones); `loss` replaces the
    loss of the conventions where a SPEC defines its own.
    """

    forward: Callable[[Tensors], Mapping[str, Tensor]]
    parameters: Tensors = field(default_factory=dict)
    loss_outputs: tuple[str, ...] | None = None
    loss: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    tolerance: Tolerance = Tolerance()


Adapter = Callable[[str, dict[str, Any], Tensors, Tensors], Built]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One npz file, loaded."""

    system: str
    stem: str
    hparams: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Case":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        hparams = json.loads(str(arrays.pop("hparams"))) if "hparams" in arrays else {}
        return cls(system=path.parent.name, stem=path.stem, hparams=hparams, arrays=arrays)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix:`, by the rest of their name."""
        return {key[len(prefix) + 1 :]: array for key, array in self.arrays.items() if key.startswith(prefix + ":")}

    def tensors(self, prefix: str, dtype: torch.dtype) -> Tensors:
        """The same as tensors; floating ones as `dtype`, whole numbers as they are."""
        made = {name: torch.from_numpy(np.array(array)) for name, array in self.group(prefix).items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}

    @property
    def gradnorms(self) -> dict[str, float]:
        if "gradnorm_names" not in self.arrays:
            return {}
        return dict(
            zip(map(str, self.arrays["gradnorm_names"]), map(float, self.arrays["gradnorm_values"]), strict=True)
        )


def find_cases(folders: list[Path]) -> list[Path]:
    """Every `<system>/<stem>.npz` below the folders, sorted; a file found twice with equal bytes is taken once."""
    found: dict[tuple[str, str, bytes], Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.npz")):
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
            found.setdefault((path.parent.name, path.stem, digest), path)
    return [found[key] for key in sorted(found, key=lambda key: key[:2])]


def from_module(
    module: nn.Module,
    params: Tensors,
    *,
    outputs: tuple[str, ...] = ("y",),
    rename: Callable[[str], str] = str,
    tolerance: Tolerance = Tolerance(),
) -> Built:
    """Load the official `params` (every one, and all of them) into `module`; its single input is the case's only one.

    `rename` is the named mapping official name -> our name. The module's results are named by `outputs` in order.
    """
    dtype = next(iter(params.values())).dtype
    module = module.to(dtype).eval()
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict(counters | {rename(name): value for name, value in params.items()}, strict=True)
    ours = dict(module.named_parameters(remove_duplicate=False))

    def forward(inputs: Tensors) -> dict[str, Tensor]:
        result = module(*inputs.values())
        results = result if isinstance(result, tuple | list) else (result,)
        return dict(zip(outputs, results, strict=True))

    named = {name: ours[rename(name)] for name in params if rename(name) in ours}
    return Built(forward=forward, parameters=named, tolerance=tolerance)
