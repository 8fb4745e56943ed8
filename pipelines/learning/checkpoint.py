"""The state of a training on disk without pickle: tensors in safetensors, numbers in JSON; whole at any moment.

`state_<epoch>.safetensors` is written first, `checkpoint.json` names it and is replaced last, older states go then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from medmamba.errors import ConfigError
from medmamba.files import hash_file, write_bytes, write_json

INDEX = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is done: epochs, the record of each, and the settings that must not change on resume."""

    epoch: int
    history: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]


def save_checkpoint(folder: Path, network: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """Weights, optimizer and random state after an epoch; atomically."""
    states = optimizer.state_dict()
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    for index, state in states["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors |= {f"random.{k}": v for k, v in random_state().items()}
    name = f"state_{progress.epoch:05d}.safetensors"
    write_bytes(folder / name, save(apart(tensors)))
    values = {
        "epoch": progress.epoch,
        "history": [dict(h) for h in progress.history],
        "settings": dict(progress.settings),
        "optimizer": states["param_groups"],
        "state": name,
        "sha256": hash_file(folder / name),
    }
    write_json(folder / INDEX, values)
    for old in folder.glob("state_*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(
    folder: Path, network: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]
) -> Progress | None:
    """Puts the state back and says what is done; None when there is no checkpoint.

    Raises ConfigError when the run's settings are other than those it was begun with, or the state is damaged.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        state = folder / Path(values["state"]).name
        if hash_file(state) != values["sha256"]:
            raise ConfigError(f"{state}: is not what was saved; delete {folder} and train again")
        tensors = load_file(state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be resumed ({error}); delete {folder} and train again") from None
    changed = sorted(k for k in {*settings, *values["settings"]} if settings.get(k) != values["settings"].get(k))
    if changed:
        raise ConfigError(f"{path}: begun with other settings of {changed}; put them back or choose another output")
    network.load_state_dict(below(tensors, "network."))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in below(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": values["optimizer"]})
    set_random_state(below(tensors, "random."))
    return Progress(epoch=values["epoch"], history=tuple(values["history"]), settings=values["settings"])


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each its own: safetensors refuses parameters with two names (MONAI's DynUNet has them)."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def random_state() -> dict[str, Tensor]:
    """Torch's generators: of the CPU and, where there is one, of the GPU in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Puts back what `random_state` gave, as far as the devices are there."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
