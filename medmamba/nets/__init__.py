"""Networks by name. The table holds import strings, so that reading it imports no network."""

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor, nn

from medmamba.errors import ConfigError

NETWORKS: dict[str, str] = {
    "agunet": "medmamba.nets.agunet:AGUNet",
    "attswinunet": "medmamba.nets.attswinunet:AttSwinUNet",
    "awmambabcd": "medmamba.nets.atrousmamba:AWMambaBCD",
    "awmambascd": "medmamba.nets.atrousmamba:AWMambaSCD",
    "daf": "medmamba.nets.daf:DAF",
    "dagunet": "medmamba.nets.dagunet:DAGUNet",
    "dformer": "medmamba.nets.dformer:DFormer",
    "efficientvim": "medmamba.nets.efficientvim:EfficientViM",
    "efficientvmamba": "medmamba.nets.efficientvmamba:EfficientVMamba",
    "groupmamba": "medmamba.nets.groupmamba:GroupMamba",
    "herseg": "medmamba.nets.herseg:HERSeg",
    "mamba_unet": "medmamba.nets.mamba_unet:MambaUNet",
    "mambabcd": "medmamba.nets.changemamba:MambaBCD",
    "mambafcs": "medmamba.nets.mambafcs:MambaFCS",
    "mambaout": "medmamba.nets.mambaout:MambaOut",
    "mambascd": "medmamba.nets.changemamba:MambaSCD",
    "mhsvm": "medmamba.nets.mhsvm:MHSVM",
    "msvmamba": "medmamba.nets.msvmamba:MSVMamba",
    "paratranscnn": "medmamba.nets.paratranscnn:ParaTransCNN",
    "reversible_mbconv_unet": "medmamba.nets.reversible_mbconv_unet:ReversibleMBConvUNet",
    "segmamba": "medmamba.nets.segmamba:SegMamba",
    "umamba": "medmamba.nets.umamba:UMamba",
    "vim": "medmamba.nets.vim:Vim",
    "vmamba": "medmamba.nets.vmamba:VMamba",
    "vssd": "medmamba.nets.vssd:VSSD",
}

# Those that give one row of scores per image, (B, K); all others give a map of scores, (B, K, *space).
CLASSIFIERS = frozenset(
    {"efficientvim", "efficientvmamba", "groupmamba", "mambaout", "msvmamba", "vim", "vmamba", "vssd"}
)

# Those that compare two dates stacked on channels, (B, 2C, *space), the earlier one first.
PAIRED = frozenset({"awmambabcd", "awmambascd", "mambabcd", "mambafcs", "mambascd"})


def network_class(name: str) -> type[nn.Module]:
    """The class named in `NETWORKS`; it has a frozen `Config` and is made by `network_class(name)(config)`.

    Raises ConfigError for an unknown name, with the known ones.
    """
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; known: {', '.join(sorted(NETWORKS))}")
    module, _, attribute = NETWORKS[name].partition(":")
    found: type[nn.Module] = getattr(import_module(module), attribute)
    return found


def own_name(network: type[nn.Module], official: str) -> str | None:
    """Our name of a tensor of the published state_dict; None for one that repeats another and is left out.

    Names are the same unless the network says otherwise by a static method `own_name`.
    """
    named = getattr(network, "own_name", None)
    return official if named is None else named(official)


def own_tensors(network: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under our names. A network whose tensors also lie otherwise has a method `own_tensors`."""
    if (turned := getattr(network, "own_tensors", None)) is not None:
        return dict(turned(published))
    named = {own_name(type(network), name): value for name, value in published.items()}
    return {name: value for name, value in named.items() if name is not None}
