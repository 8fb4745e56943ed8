"""Vision Mamba: `case` is the bidirectional mixer, `case_net` the classifier."""

from dataclasses import replace
from typing import Any

from medmamba.layers.mamba import Mamba, backward
from medmamba.nets.vim import Vim, VimConfig
from tests.golden.adapters.mamba_block import sizes
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if "img_size" in hparams:
        return from_module(Vim(net_config(hparams)), params)
    config = replace(
        sizes(hparams, params),
        average=hparams.get("if_divide_out", False),
        layer_scale=hparams.get("init_layer_scale"),
    )
    return from_module(Mamba(config, {"": None, "_b": backward}), params)


def net_config(hparams: dict[str, Any]) -> VimConfig:
    size = hparams["img_size"]
    return VimConfig(
        in_channels=hparams.get("channels", 3),
        out_channels=hparams.get("num_classes", 1000),
        image_px=tuple(size) if isinstance(size, list) else (size, size),
        patch_px=hparams["patch_size"],
        stride_px=hparams.get("stride", hparams["patch_size"]),
        depth=hparams["depth"],
        width=hparams["embed_dim"],
        d_state=hparams.get("d_state", 16),
        d_conv=hparams.get("d_conv", 4),
        expand=hparams.get("expand", 2),
        average=hparams.get("if_divide_out", True),
        layer_scale=hparams.get("init_layer_scale"),
    )
