"""MambaOut: `case_block` is one gated convolution block, `case` the classifier."""

from typing import Any

from medmamba.nets.mambaout import GatedConvBlock, MambaOut, MambaOutConfig
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = MambaOutConfig(
        in_channels=hparams.get("in_chans", 3),
        out_channels=hparams.get("num_classes", 1000),
        depths=tuple(hparams.get("depths", MambaOutConfig().depths)),
        widths=tuple(hparams.get("dims", MambaOutConfig().widths)),
        kernel=hparams.get("kernel_size", 7),
        conv_ratio=hparams.get("conv_ratio", 1.0),
        expansion=hparams.get("expansion_ratio", 8 / 3),
    )
    if "dim" in hparams:
        return from_module(GatedConvBlock(hparams["dim"], config), params)
    return from_module(MambaOut(config), params)
