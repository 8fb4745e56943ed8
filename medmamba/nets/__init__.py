"""Networks by name. The table holds import strings, so that reading it imports no network."""

from importlib import import_module

from torch import nn

from medmamba.errors import ConfigError

NETWORKS: dict[str, str] = {
    "agunet": "medmamba.nets.agunet:AGUNet",
    "attswinunet": "medmamba.nets.attswinunet:AttSwinUNet",
    "daf": "medmamba.nets.daf:DAF",
    "dagunet": "medmamba.nets.dagunet:DAGUNet",
    "dformer": "medmamba.nets.dformer:DFormer",
    "efficientvim": "medmamba.nets.efficientvim:EfficientViM",
    "efficientvmamba": "medmamba.nets.efficientvmamba:EfficientVMamba",
    "groupmamba": "medmamba.nets.groupmamba:GroupMamba",
    "herseg": "medmamba.nets.herseg:HERSeg",
    "mamba_unet": "medmamba.nets.mamba_unet:MambaUNet",
    "mambaout": "medmamba.nets.mambaout:MambaOut",
    "mhsvm": "medmamba.nets.mhsvm:MHSVM",
    "msvmamba": "medmamba.nets.msvmamba:MSVMamba",
    "paratranscnn": "medmamba.nets.paratranscnn:ParaTransCNN",
    "segmamba": "medmamba.nets.segmamba:SegMamba",
    "umamba": "medmamba.nets.umamba:UMamba",
    "vim": "medmamba.nets.vim:Vim",
    "vmamba": "medmamba.nets.vmamba:VMamba",
    "vssd": "medmamba.nets.vssd:VSSD",
}


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
