"""Networks by name: those of `medmamba.nets` and MONAI's baselines, built from the settings in a run file or a bundle.

An entry maps settings to a network. Nothing is imported before one is built: MONAI takes seconds.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from medmamba.errors import ConfigError
from medmamba.nets import CLASSIFIERS, network_class
from medmamba.nets import NETWORKS as OURS

Builder = Callable[[Mapping[str, Any]], nn.Module]

MONAI = {
    "segresnet": "monai.networks.nets.segresnet:SegResNet",
    "dynunet": "monai.networks.nets.dynunet:DynUNet",
    "unet": "monai.networks.nets.unet:UNet",
    "swinunetr": "monai.networks.nets.swin_unetr:SwinUNETR",
}


def segmentation_settings(
    name: str, own: Mapping[str, Any], *, in_channels: int, out_channels: int, size: tuple[int, ...]
) -> dict[str, Any]:
    """All settings of network `name` for segmentation: the user's `own` and what the contract with the data decides.

    `size` is the window as the network sees it; a network built for one image size (`image_px`) gets it. Raises
    ConfigError when the network scores whole images or has another rank.
    """
    decided = {"in_channels": in_channels, "out_channels": out_channels, "spatial_dims": len(size)}
    if name not in OURS:
        return {**own, **decided}
    if name in CLASSIFIERS:
        dense = ", ".join(sorted((set(OURS) | set(MONAI)) - CLASSIFIERS))
        raise ConfigError(f"network {name!r} scores whole images; for segmentation choose one of {dense}")
    kind: Any = network_class(name).Config  # type: ignore[attr-defined]
    names = {field.name for field in dataclasses.fields(kind)}
    settings = {"image_px": size, **own, **decided}
    settings = {key: value for key, value in settings.items() if key in names or key in own}
    rank = getattr(kind, "spatial_dims", None)
    if isinstance(rank, int) and "spatial_dims" not in names and rank != len(size):
        planes = "; a 2D network sees the planes of a volume with a window (1, y, x)" if rank == 2 else ""
        raise ConfigError(f"network {name!r} takes {rank} axes, the window shows it {len(size)}: {size}{planes}")
    return settings


def build_ours(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A network of `medmamba.nets`: its frozen Config from `settings`. Raises ConfigError naming the wrong keys."""
    kind = network_class(name)
    config: Callable[..., Any] = kind.Config  # type: ignore[attr-defined]
    known = list(inspect.signature(config).parameters)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"network {name!r} has no settings {unknown}; known: {', '.join(known)}")
    try:
        return kind(config(**{k: as_tuples(v) for k, v in settings.items()}))
    except TypeError as error:
        raise ConfigError(f"network {name!r}: {error}; known settings: {', '.join(known)}") from error


def build_monai(path: str, settings: Mapping[str, Any]) -> nn.Module:
    """A MONAI network from its own keyword arguments (DynUNet wants `kernel_size`, `strides` and more)."""
    module, _, attribute = path.partition(":")
    kind = getattr(import_module(module), attribute)
    known = list(inspect.signature(kind).parameters)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"network {attribute} has no settings {unknown}; known: {', '.join(known)}")
    try:
        network: nn.Module = kind(**settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"network {attribute} with {dict(settings)}: {error}") from error
    return network


def as_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that frozen configs hold."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


NETWORKS: dict[str, Builder] = {
    **{name: partial(build_ours, name) for name in OURS},
    **{name: partial(build_monai, path) for name, path in MONAI.items()},
}
