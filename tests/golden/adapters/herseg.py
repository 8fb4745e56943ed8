"""HER-Seg's image encoder: tokens (B, L, C) out. The stored rotary tables are a function of the size."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.nets.herseg import HERSegConfig, HERSegEncoder
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = HERSegConfig(
        in_channels=hparams.get("in_chans", next(iter(inputs.values())).shape[1]),
        width=hparams["embed_dim"],
        patch_px=hparams.get("patch_size", 16),
        depths=tuple(hparams["depths"]),
        heads=tuple(hparams["num_heads"]),
        mlp_ratio=hparams.get("mlp_ratio", 2.0),
    )
    encoder = HERSegEncoder(config)
    built = from_module(encoder, {name: value for name, value in params.items() if encoder.own_name(name) is not None})

    def forward(named: Tensors) -> dict[str, Tensor]:
        return {"y": encoder(named["x"]).flatten(2).mT}

    return replace(built, forward=forward)
