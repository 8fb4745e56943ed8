"""D-Former with its three heads: full, ds1, ds2. The published network pads to whole patches and does not crop."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.layers.patches import pad_image
from medmamba.nets.dformer import DFormer, DFormerConfig
from tests.golden.case import Built, Tensors, Tolerance, from_module

NOISY = Tolerance(noisy=True)  # layer norms over a handful of channels


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = DFormerConfig(
        in_channels=hparams.get("in_chans", 1),
        out_channels=hparams.get("num_classes", 14),
        width=hparams.get("embed_dim", 96),
        depths=tuple(hparams["depths"]),
        heads=tuple(hparams["num_heads"]),
        intervals=tuple(hparams["interval_list"]),
        patch=tuple(hparams["patch_size"]),
        group=tuple(hparams["group_size"]),
        mlp_ratio=hparams.get("mlp_ratio", 4.0),
        deep_supervision=True,
    )
    network = DFormer(config)
    built = from_module(network, params, tolerance=NOISY)

    def forward(named: Tensors) -> dict[str, Tensor]:
        scores = network(pad_image(named["x"], config.patch))
        return dict(zip(("full", "ds1", "ds2"), scores))

    return replace(built, forward=forward)
