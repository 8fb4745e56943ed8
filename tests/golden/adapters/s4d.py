"""The S4D layer; the kernel for the length of the input is an output too."""

from dataclasses import replace
from typing import Any

from medmamba.layers.s4d import S4D, S4DConfig
from tests.golden.case import Built, Tensors, Tolerance, from_module

MEASURED = Tolerance(output=2.3e-5, gradient=2.7e-4)  # ten times what the SPEC measured of the official code in float32


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    first = hparams.get("transposed", True)
    states = hparams.get("d_state", 64) // 2 * 2  # whole pairs are kept
    layer = S4D(S4DConfig(d_model=hparams["d_model"], d_state=states, channels_first=first))
    built = from_module(layer, params, tolerance=MEASURED)

    def forward(inputs: Tensors) -> Tensors:
        return {"kernel": layer.kernel(inputs["u"].shape[2 if first else 1]), "y": layer(inputs["u"])}

    return replace(built, forward=forward)
