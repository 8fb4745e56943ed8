"""EfficientViM: `case` is the block, `case_mixer` the hidden-state mixer, `case_net` the classifier."""

import math
from typing import Any

from torch import Tensor, nn

from medmamba.nets.efficientvim import EfficientViM, EfficientViMBlock, EfficientViMConfig, HiddenStateMixer
from tests.golden.case import Built, Tensors, Tolerance, from_module

NORMS_IN_FLOAT32 = Tolerance(gradient=2e-4)  # 10 x the error the SPEC measured (1.7e-5)


class SquareTokens(nn.Module):
    """The mixer as published: tokens (B, C, L) of a square map in, the map and its states out."""

    def __init__(self, inner: HiddenStateMixer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side = math.isqrt(x.shape[-1])
        y, h = self.inner(x.unflatten(-1, (side, side)))
        return y, h


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    expand = hparams.get("ssd_expand", 1.0)
    if "depths" in hparams:
        config = EfficientViMConfig(
            in_channels=hparams.get("in_dim", 3),
            out_channels=hparams.get("num_classes", 1000),
            widths=tuple(hparams["embed_dim"]),
            depths=tuple(hparams["depths"]),
            states=tuple(hparams["state_dim"]),
            expand=expand,
            mlp_ratio=hparams.get("mlp_ratio", 4.0),
            distillation=hparams.get("distillation", False),
        )
        return from_module(EfficientViM(config), params, tolerance=NORMS_IN_FLOAT32)
    if "d_model" in hparams:
        mixer = HiddenStateMixer(hparams["d_model"], states=hparams["state_dim"], expand=expand)
        return from_module(SquareTokens(mixer), params, outputs=("y", "h"), rename=lambda name: f"inner.{name}")
    block = EfficientViMBlock(
        hparams["dim"], states=hparams["state_dim"], expand=expand, mlp_ratio=hparams.get("mlp_ratio", 4.0)
    )
    return from_module(block, params, outputs=("y", "h"))
