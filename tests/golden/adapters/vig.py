"""ViG's gated linear attention mixer on a map of `patch_resolution`."""

from dataclasses import replace
from typing import Any

from medmamba.layers.gla import GatedLinearAttention, GatedLinearAttentionConfig
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if hparams.get("rope_mode", "none") != "none":
        raise NotImplementedError(f"rotary positions are not described in the SPEC: {hparams['rope_mode']!r}")
    config = GatedLinearAttentionConfig(
        d_model=hparams["d_model"],
        heads=hparams.get("num_heads", 4),
        expand_key=hparams.get("expand_k", 1.0),
        expand_value=hparams.get("expand_v", 1.0),
        gate_divisor=hparams.get("gate_logit_normalizer", 16),
        gate_rank=hparams.get("gate_low_rank_dim", 16),
        gate_floor=hparams.get("clamp_min"),
        local_activation=hparams.get("use_act_in_conv", True),
        local_bias="in_proj.0.bias" in params,
        out_activation=hparams.get("use_out_act", False),
    )
    layer = GatedLinearAttention(config)
    space = tuple(hparams["patch_resolution"])
    return replace(from_module(layer, params), forward=lambda inputs: {"y": layer(inputs["x"], space)})
