"""Everything that makes a trained function: network, contract with the data, task, weights; a folder without pickle.

`bundle.json` + `weights_<fold>.safetensors`. `id` hashes what changes the function; the card is not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medmamba.ensemble import OUTPUTS, Disagreement, MeanOfFolds, Mirrored, Moments, Outputs
from medmamba.errors import BundleError, MedMambaError
from medmamba.files import hash_file, hash_json, write_bytes, write_json
from medmamba.layers.planes import OnPlanes
from medmamba.memory import without_data
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

    def __hash__(self) -> int:
        return hash((self.folder, self.weight_hashes))

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
        return self._mean(self._folds(builders))

    def build_with_disagreement(self, builders: Mapping[str, Builder]) -> nn.Module:
        """The network of `build`, with one score more: how far its folds and mirrorings disagree, 0..1 bit."""
        return self._moments(self._folds(builders))

    def outline(self, builders: Mapping[str, Builder]) -> nn.Module:
        """The network of `build`, of several members that with disagreement, without weights or data: shapes only, on
        the meta device. Raises BundleError."""
        build = self._builder(builders)
        folds = [without_data(lambda: build(self.config)) for _ in self.weights]
        return self._moments(folds) if self.members > 1 else self._mean(folds)

    @property
    def members(self) -> int:
        """How many opinions the network is the mean of: folds times mirrorings."""
        return len(self.weights) * 2 ** len(self.preprocessing.mirror)

    @property
    def _outputs(self) -> Outputs:
        name = self.task.get("outputs", "softmax")
        if name not in OUTPUTS:
            raise BundleError(f"{self.folder}: outputs {name!r} unknown; known: {', '.join(OUTPUTS)}")
        return OUTPUTS[name]

    def _mean(self, folds: list[nn.Module]) -> nn.Module:
        return self._worn(folds[0] if len(folds) == 1 else MeanOfFolds(folds, self._outputs)).eval()

    def _moments(self, folds: list[nn.Module]) -> nn.Module:
        return Disagreement(self._worn(Moments(folds, self._outputs)), self._outputs).eval()

    def _worn(self, network: nn.Module) -> nn.Module:
        """As the window loop wants it, mirrorings included."""
        return mirrored(worn(network, self.preprocessing.windowing), self.preprocessing.mirror)

    def _folds(self, builders: Mapping[str, Builder]) -> list[nn.Module]:
        """A network a weight file."""
        build, folds = self._builder(builders), []
        for name in self.weights:
            network = build(self.config)
            try:
                network.load_state_dict(load_file(self.folder / name))
            except (SafetensorError, RuntimeError) as error:
                raise BundleError(
                    f"{self.folder / name}: the weights do not fit network {self.network!r}: {error}"
                ) from None
            folds.append(network)
        return folds

    def _builder(self, builders: Mapping[str, Builder]) -> Builder:
        if self.network not in builders:
            raise BundleError(f"{self.folder}: network {self.network!r} unknown; known: {', '.join(sorted(builders))}")
        return builders[self.network]


def worn(network: nn.Module, windowing: Windowing) -> nn.Module:
    """The network as the window loop wants it, `(B, C, *window) -> (B, K, *window)`."""
    return network if windowing.network_size == windowing.size else OnPlanes(network)


def mirrored(network: nn.Module, axes: Sequence[int]) -> nn.Module:
    """The network as it is, or its mean over the mirrorings of `axes`."""
    return Mirrored(network, axes) if axes else network


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
