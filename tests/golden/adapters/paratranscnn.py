"""ParaTransCNN: the whole network."""

from typing import Any

from medmamba.nets.paratranscnn import ParaTransCNN, ParaTransCNNConfig
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = ParaTransCNNConfig(
        in_channels=next(iter(inputs.values())).shape[1],
        out_channels=hparams.get("num_classes", 9),
        widths=tuple(hparams.get("resnet_widths", (64, 128, 256, 512))),
        blocks=tuple(hparams.get("resnet_blocks", (3, 4, 6, 3))),
        dim=hparams.get("dim", 320),
        depths=tuple(hparams.get("depth", (3, 3, 3))),
        heads=hparams.get("heads", 8),
    )
    return from_module(ParaTransCNN(config), params)
