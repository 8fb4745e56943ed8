"""Published weights to a bundle; weights without their preprocessing are none, so a contract comes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medmamba.bundle import Bundle, save_bundle
from medmamba.errors import BundleError, ConfigError
from medmamba.files import hash_file
from medmamba.nets import NETWORKS as OURS
from medmamba.nets import own_tensors
from pipelines.config import Contract
from pipelines.networks import NETWORKS

WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model", "model_state")  # where checkpoints keep them
PREFIXES = ("module.", "_orig_mod.")  # of networks saved from data-parallel or compiled ones
SHOWN = 8  # names in a message


def import_weights(contract: Contract, file: Path, output: Path) -> Bundle:
    """The bundle `output` from the tensors of `file` under their published names and a contract with the data.

    The card says which file (name and hash) it was. Raises BundleError naming every tensor that is missing, left over
    or of another shape; ConfigError for an output that holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output}: not empty; give a new folder for the bundle")
    if contract.architecture not in NETWORKS:
        raise ConfigError(f"network {contract.architecture!r} unknown; known: {', '.join(sorted(NETWORKS))}")
    network = NETWORKS[contract.architecture](contract.network_config)
    state = fitted(network, renamed(contract.architecture, network, read_tensors(file)), file)
    return save_bundle(
        output,
        name=contract.name,
        network=contract.architecture,
        config=contract.network_config,
        preprocessing=contract.preprocessing.contract(),
        task=contract.task,
        states=[state],
        card={**contract.card, "imported": {"file": file.name, "sha256": hash_file(file)}},
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file or a torch checkpoint, the latter read without running anything in it.

    Raises BundleError when it is neither.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BundleError(f"{file}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise BundleError(f"{file}: not readable as safetensors or torch tensors: {error}") from None
    except Exception as error:  # torch raises UnpicklingError for what is not a plain tensor file
        first = str(error).splitlines()[0]
        raise BundleError(
            f"{file}: holds more than tensors and is not run ({first}); save its state_dict alone"
        ) from None
    while isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = next((found[w] for w in WRAPPERS if isinstance(found.get(w), Mapping)), None)
        if inner is None:
            raise BundleError(f"{file}: no tensors found; its entries are {', '.join(map(str, list(found)[:SHOWN]))}")
        found = inner
    if not isinstance(found, Mapping):
        raise BundleError(f"{file}: a {type(found).__name__} found, a state_dict (name -> tensor) expected")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def renamed(architecture: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names; those that repeat another one are left out."""
    plain = dict(tensors)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return own_tensors(network, plain) if architecture in OURS else plain


def fitted(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """All of the network's tensors, filled from `tensors`. Counters of batches may be missing or left over."""
    own = network.state_dict()
    counters = {name for name in (*own, *tensors) if name.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(tensors) - counters)
    extra = sorted(set(tensors) - set(own) - counters)
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and value.shape != own[name].shape
    ]
    kinds = {"missing": missing, "left over": extra, "of another shape": shapes}
    faults = [
        f"{len(f)} {kind}: {', '.join(f[:SHOWN])}{', ...' if len(f) > SHOWN else ''}" for kind, f in kinds.items() if f
    ]
    if faults:
        raise BundleError(
            f"{file}: the tensors do not fit {type(network).__name__} as the contract sets it up; {'; '.join(faults)}; "
            "change [network], the channels or the labels of the contract"
        )
    return {name: tensors[name].to(value.dtype) if name in tensors else value for name, value in own.items()}
