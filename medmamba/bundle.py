"""Everything that makes a trained function: network, contract with the data, task, weights; a folder without pickle.

`bundle.json` + `weights_<fold>.safetensors`. `id` hashes what changes the function; the card is not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medmamba.errors import BundleError, MedMambaError
from medmamba.files import hash_file, hash_json, write_bytes, write_json
from medmamba.layers.planes import OnPlanes
from medmamba.preprocessing import Preprocessing
from medmamba.windows import Windowing

FORMAT = 1
Builder = Callable[[Mapping[str, Any]], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """`network` a name of the networks table, `config` its settings, `task` {"name", ...}, `weights` a file a fold."""

    name: str
    network: str
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    task: Mapping[str, Any]
    folder: Path
    weights: tuple[str, ...]
    weight_hashes: tuple[str, ...]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return hash_json({**self._function(), "weights": list(self.weight_hashes)})

    @property
    def title(self) -> str:
        """`<name>-<id8>`: the folder of its products."""
        return f"{self.name}-{self.id[:8]}"

    @property
    def classes(self) -> int:
        return int(self.config["out_channels"])

    def _function(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "network": self.network,
            "config": dict(self.config),
            "preprocessing": self.preprocessing.to_json(),
            "task": dict(self.task),
        }

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Reads the description and hashes the weights; builds nothing. Raises BundleError naming the file."""
        path = folder / "bundle.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{folder}: no bundle.json there; give the folder that `medmamba train` wrote") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: cannot be read ({error}); write the bundle again") from None
        if values.get("format") != FORMAT:
            raise BundleError(
                f"{path}: format {values.get('format')!r}, this version reads {FORMAT}; train or convert again"
            )
        try:
            weights = tuple(values["weights"])
            missing = [w for w in weights if Path(w).name != w or not (folder / w).is_file()]
            if missing or not weights:
                raise BundleError(f"{folder}: weight files {missing or 'none'} named in bundle.json are not there")
            return cls(
                name=values["name"],
                network=values["network"],
                config=values["config"],
                preprocessing=Preprocessing.from_json(values["preprocessing"]),
                task=values["task"],
                folder=folder,
                weights=weights,
                weight_hashes=tuple(hash_file(folder / w) for w in weights),
                card=values.get("card", {}),
            )
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"{path}: entry {error} is missing or of the wrong type; write the bundle again"
            ) from None
        except MedMambaError as error:
            raise BundleError(f"{path}: {error}") from error

    def build(self, builders: Mapping[str, Builder]) -> nn.Module:
        """The network (folds averaged when there are several), weights loaded, on the CPU, evaluation mode.

        It takes windows of the contract: a 2D network is shown the planes of a volume one by one.
        """
        if self.network not in builders:
            raise BundleError(f"{self.folder}: network {self.network!r} unknown; known: {', '.join(sorted(builders))}")
        folds = []
        for name in self.weights:
            network = builders[self.network](self.config)
            try:
                network.load_state_dict(load_file(self.folder / name))
            except (SafetensorError, RuntimeError) as error:
                raise BundleError(
                    f"{self.folder / name}: the weights do not fit network {self.network!r}: {error}"
                ) from None
            folds.append(network)
        network = folds[0] if len(folds) == 1 else MeanOfFolds(folds)
        return worn(network, self.preprocessing.windowing).eval()


def worn(network: nn.Module, windowing: Windowing) -> nn.Module:
    """The network as the window loop wants it, `(B, C, *window) -> (B, K, *window)`."""
    return network if windowing.network_size == windowing.size else OnPlanes(network)


class MeanOfFolds(nn.Module):
    """A network wearing networks: the mean of their softmax over classes, as logarithms."""

    def __init__(self, folds: list[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(folds)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> (B, K, *space), the log of the mean probability."""
        parts = torch.stack([f(x).float().log_softmax(1) for f in self.folds])
        return torch.logsumexp(parts, 0) - float(torch.log(torch.tensor(float(len(self.folds)))))


def save_bundle(
    folder: Path,
    *,
    name: str,
    network: str,
    config: Mapping[str, Any],
    preprocessing: Preprocessing,
    task: Mapping[str, Any],
    states: list[Mapping[str, Tensor]],
    card: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes a bundle, `bundle.json` last, and reads it back."""
    weights = [f"weights_{i}.safetensors" for i in range(len(states))]
    for file, state in zip(weights, states, strict=True):
        write_bytes(folder / file, save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}))
    values = {
        "format": FORMAT,
        "name": name,
        "network": network,
        "config": dict(config),
        "preprocessing": preprocessing.to_json(),
        "task": dict(task),
        "weights": weights,
        "card": dict(card or {}),
    }
    write_json(folder / "bundle.json", values)
    return Bundle.load(folder)
