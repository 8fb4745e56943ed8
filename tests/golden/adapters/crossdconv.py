"""Cross-D convolution: the layer, with axis, angle and turned kernels as further outputs; only y enters the loss."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.layers.crossd_conv import CrossDConv
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    layer = CrossDConv(
        hparams["in_channels"],
        hparams["out_channels"],
        hparams["kernel_size"],
        stride=hparams.get("stride", 1),
        padding=hparams.get("padding", 0),
        groups=hparams.get("groups", 1),
    )
    built = from_module(layer, params)

    def forward(named: Tensors) -> dict[str, Tensor]:
        axis, angle = layer.rotation(named["x"])
        return {
            "y": layer(named["x"]),
            "axis": axis,
            "angle": angle,
            "rotated_weights": layer.rotated_weights(axis, angle),
        }

    return replace(built, forward=forward, loss_outputs=("y",))
