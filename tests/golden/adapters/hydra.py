"""The Hydra block."""

from typing import Any

from medmamba.layers.hydra import Hydra, hydra_config
from tests.golden.adapters.mamba2_ssd import settings
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    return from_module(Hydra(hydra_config(**settings(hparams, params))), params)
