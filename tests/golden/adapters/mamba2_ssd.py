"""Mamba-2: the operator alone (no parameters) or the whole block."""

from typing import Any

from medmamba.layers.mamba2 import Mamba2, Mamba2Config
from medmamba.ops.ssd import ssd
from tests.golden.case import Built, Tensors, from_module

NAMES = {
    "d_model": "d_model",
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "headdim": "head_width",
    "ngroups": "groups",
    "chunk_size": "chunk",
    "learnable_init_states": "learnable_start",
    "norm_before_gate": "norm_before_gate",
    "conv_bias": "conv_bias",
    "bias": "bias",
}


def settings(hparams: dict[str, Any], params: Tensors) -> dict[str, Any]:
    """Config fields from official constructor names; what is left out is told by the parameters that are there."""
    given = {ours: hparams[name] for name, ours in NAMES.items() if name in hparams}
    given.setdefault("learnable_start", "init_states" in params)
    given.setdefault("conv_bias", "conv1d.bias" in params)
    given.setdefault("bias", "in_proj.bias" in params)
    limit = tuple(map(float, hparams.get("dt_limit") or (0.0, float("inf"))))
    return {**given, "step_limit": None if limit == (0.0, float("inf")) else limit}


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if params:
        return from_module(Mamba2(Mamba2Config(**settings(hparams, params))), params)

    def forward(inputs: Tensors) -> Tensors:
        ordered = [inputs[name] for name in ("X", "dt", "A", "B", "C")]
        y, state = ssd(*ordered, inputs.get("initial_states"), chunk=hparams.get("block_len", 32))
        if "D" in inputs:
            y = y + inputs["D"][:, None] * inputs["X"]
        return {"y": y, "final_state": state}

    return Built(forward=forward)
