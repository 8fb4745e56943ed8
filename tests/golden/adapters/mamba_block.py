"""The Mamba block in one direction."""

from typing import Any

from medmamba.layers.mamba import Mamba, MambaConfig
from tests.golden.case import Built, Tensors, from_module


def sizes(hparams: dict[str, Any], params: Tensors, prefix: str = "") -> MambaConfig:
    """Config from official constructor names; what is left out is told by the parameters that are there."""
    names = ("d_model", "d_state", "d_conv", "expand", "conv_bias", "bias")
    given = {name: hparams[name] for name in names if name in hparams}
    rank = hparams.get("dt_rank", "auto")
    given["dt_rank"] = None if rank in ("auto", None) else rank
    given.setdefault("conv_bias", f"{prefix}conv1d.bias" in params)
    given.setdefault("bias", f"{prefix}in_proj.bias" in params)
    return MambaConfig(**given)


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    return from_module(Mamba(sizes(hparams, params)), params)
