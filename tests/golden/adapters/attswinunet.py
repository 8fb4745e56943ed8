"""Attention Swin U-Net: the whole network; cross attention that a setting leaves out is in the file all the same."""

from typing import Any

from medmamba.nets.attswinunet import AttSwinUNet, AttSwinUNetConfig
from tests.golden.case import Built, Tensors, from_module

CROSS_LEVELS = {"1": 1, "2": 2, "3": 3}  # anything else, also the number 3, silently gives plain skips
CROSS = "decoder.Crossvit_layer."


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    shown = next(iter(inputs.values())).shape
    image = hparams.get("image_size", hparams.get("img_size", shown[2:]))
    config = AttSwinUNetConfig(
        in_channels=hparams.get("in_chans", shown[1]),
        out_channels=hparams["num_classes"],
        image_px=(image, image) if isinstance(image, int) else tuple(image),
        width=hparams["embed_dim"],
        depths=tuple(hparams["depths"]),
        heads=tuple(hparams["num_heads"]),
        window=hparams["window_size"],
        mlp_ratio=hparams.get("mlp_ratio", 4.0),
        qkv_bias="encoder.layers.0.blocks.0.attn.qkv.bias" in params,
        skip=skip(hparams),
        cross_levels=CROSS_LEVELS.get(hparams.get("skip_num"), 0),
        cross_depth=hparams.get("cross_depth", 2),
        cross_heads=hparams.get("cross_heads", 8),
        cross_head_width=hparams.get("cross_dim_head", 64),
    )
    network = AttSwinUNet(config)
    used = {name: value for name, value in params.items() if network.own_name(name) is not None}
    levels = tuple(f"{CROSS}{level}." for level in network.decoder.Crossvit_layer)
    return from_module(
        network, {name: value for name, value in used.items() if not name.startswith(CROSS) or name.startswith(levels)}
    )


def skip(hparams: dict[str, Any]) -> str:
    if hparams.get("mode", "cross_contextual_attention") == "cross_contextual_attention":
        return "cross"
    return "linear_twice" if hparams.get("spatial_attention", "0") == "1" else "linear"
