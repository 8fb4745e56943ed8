"""DAF: everything after the backbone, whose maps are inputs; x only supplies the size of the result."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.nets.daf import DAF, LEVELS, DAFConfig, DAFHead
from tests.golden.case import Built, Tensors, from_module

OFFICIAL = (256, 512, 1024, 2048)


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = DAFConfig(
        out_channels=hparams.get("num_classes", 5),
        width=hparams.get("width", 64),
        backbone_widths=tuple(hparams.get("backbone_channels", OFFICIAL)),
    )
    head = DAFHead(config)
    used = {name: value for name, value in params.items() if DAF.own_name(name) is not None}
    built = from_module(head, used)

    def forward(named: Tensors) -> dict[str, Tensor]:
        maps = head([named[f"layer{level}"] for level in range(1, 5)], named["x"].shape[2:])
        outputs = {"y": maps.scores}
        outputs |= {f"predict{level}": scores for level, scores in zip(LEVELS, maps.first)}
        outputs |= {f"predict{level}_2": scores for level, scores in zip(LEVELS, maps.refined)}
        for turn, vectors in enumerate(maps.vectors, start=1):
            outputs |= {f"semVector_{turn}_{number}": vector for number, vector in enumerate(vectors, start=1)}
            rebuilt = maps.rebuilt[turn - 1 :: 2]
            outputs |= {f"rec_{turn}_{number}": map_ for number, map_ in enumerate(rebuilt, start=1)}
        outputs["loss_semantic"] = maps.semantic_loss()
        outputs["loss_reconstruction"] = maps.reconstruction_loss()
        return outputs

    return replace(built, forward=forward)
