"""ChangeMamba: `case_bcd` the binary network, `case_scd` the semantic one (three outputs)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers.change_pair import CHANGE, split_scores
from medmamba.nets.changemamba import MambaBCD, MambaBCDConfig, MambaSCD, MambaSCDConfig
from tests.golden.adapters.vmamba import scan_settings
from tests.golden.case import Built, Tensors, Tolerance, from_module

MEASURED = Tolerance(output=1.2e-5)  # 10 x the error the SPEC measured
NAMES = ("bcd", "t1", "t2")


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    classes = hparams.get("output_clf")
    if classes is None:
        bcd = MambaBCDConfig(**settings(hparams, inputs))
        return of_pair(MambaBCD(bcd), params, lambda scores: {"y": scores})
    scd = MambaSCDConfig(out_channels=CHANGE + 2 * classes, **settings(hparams, inputs))
    return of_pair(MambaSCD(scd), params, lambda scores: dict(zip(NAMES, split_scores(scores), strict=True)))


def of_pair(network: nn.Module, params: Tensors, named: Any, tolerance: Tolerance = MEASURED) -> Built:
    """The published networks take the two dates apart and give their scores apart."""
    built = from_module(network, params, tolerance=tolerance)

    def forward(dates: Tensors) -> dict[str, Tensor]:
        return named(network(torch.cat([dates["pre"], dates["post"]], dim=1)))

    return replace(built, forward=forward)


def settings(hparams: dict[str, Any], inputs: Tensors) -> dict[str, Any]:
    """Config entries of the shared encoder; released values where the case says nothing."""
    released = {"ssm_d_state": 1, "ssm_conv_bias": False, "forward_type": "v3noz"}
    return {
        "in_channels": 2 * inputs["pre"].shape[1],
        "depths": tuple(hparams["depths"]),
        "widths": tuple(hparams["dims"]),
        "width": hparams.get("width", 128),
        "patch": hparams.get("patch_size", 4),
        "mlp_ratio": hparams.get("mlp_ratio", 4.0),
        **scan_settings({**released, **hparams}),
    }
