"""HRVMamba: every case is one DVSS block."""

from typing import Any

from medmamba.nets.hrvmamba import DVSSBlock, DVSSConfig
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    rank = hparams.get("ssm_dt_rank", "auto")
    config = DVSSConfig(
        channels=hparams["hidden_dim"],
        state=hparams.get("ssm_d_state", 16),
        ratio=hparams.get("ssm_ratio", 2.0),
        dt_rank=None if rank == "auto" else rank,
        mlp_ratio=hparams.get("mlp_ratio", 4.0),
    )
    return from_module(DVSSBlock(config), params)
