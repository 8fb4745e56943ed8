"""Selective scan (S6), the operator alone: any of D, z, delta_bias may be absent, B and C shared or grouped."""

from typing import Any

from medmamba.ops.scan import selective_scan
from tests.golden.case import Built, Tensors


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    def forward(inputs: Tensors) -> Tensors:
        softplus = hparams.get("delta_softplus", False)
        y, last_state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True)
        return {"y": y, "last_state": last_state}

    return Built(forward=forward)
