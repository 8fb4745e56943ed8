"""AGUNet in Keras form: channels last, softmax outputs y0 (finest), y1, ..., and the published Dice loss of y0."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.nets.agunet import AGUNet, AGUNetConfig, from_keras
from tests.golden.case import Built, Tensors, Tolerance, from_module

KERAS = Tolerance(output=3e-5, ill_conditioned=3e-5)  # the case holds float32 numbers of another library


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    config = AGUNetConfig(
        in_channels=hparams["input_shape"][-1],
        out_channels=hparams["nb_classes"],
        widths=tuple(hparams["convolutions"]),
        pyramid=hparams.get("input_pyramid", False),
        deep_supervision=hparams.get("deep_supervision", False),
    )
    network = AGUNet(config)
    turned = from_keras(network, params)
    tensors = {official: value for official, (_, value) in turned.items()}
    built = from_module(network, tensors, rename=lambda name: turned[name][0], tolerance=KERAS)

    def forward(named: Tensors) -> dict[str, Tensor]:
        scores = network(named["x"].movedim(-1, 1))
        levels = scores if isinstance(scores, tuple) else (scores,)
        outputs = {f"y{level}": map_.softmax(dim=1).movedim(1, -1) for level, map_ in enumerate(levels)}
        if "target_onehot" in named:
            outputs["dice_loss_y0"] = dice_loss(outputs["y0"], named["target_onehot"])
        return outputs

    return replace(built, forward=forward)


def dice_loss(scores: Tensor, target: Tensor) -> Tensor:
    """The published loss, kept for comparison only: it sums over all classes and divides by one less."""
    space = tuple(range(scores.ndim - 1))
    overlap = 2 * (scores * target).sum(space) + 1
    total = scores.square().sum(space) + target.square().sum(space) + 1
    return (1 - (overlap / total).sum() / (scores.shape[-1] - 1)).clip(0, 1 - 1e-10)
