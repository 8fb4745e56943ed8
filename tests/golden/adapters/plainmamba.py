"""PlainMamba: every case is one layer."""

from typing import Any

from medmamba.nets.plainmamba import PlainMambaConfig, PlainMambaLayer
from tests.golden.adapters.views import from_tokens
from tests.golden.case import Built, Tensors


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    rank = hparams.get("dt_rank", "auto")
    config = PlainMambaConfig(
        channels=hparams["dim"],
        state=hparams.get("d_state", 16),
        expand=hparams.get("expand", 2),
        conv=hparams.get("conv_size", 7),
        dt_rank=None if rank == "auto" else rank,
        bias="mamba.in_proj.bias" in params,
        conv_bias="mamba.conv2d.bias" in params,
        layer_scale=1.0 if "mamba.gamma" in params else None,
        conv_after=hparams.get("with_dwconv", False),
    )
    return from_tokens(PlainMambaLayer(config), params, *hparams["hw"])
