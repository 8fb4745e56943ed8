"""SegMamba, the whole network."""

from typing import Any

from medmamba.nets.segmamba import SegMamba, SegMambaConfig
from tests.golden.case import Built, Tensors, Tolerance, from_module

NOISY = Tolerance(noisy=True)  # instance norms over a handful of voxels, then LeakyReLU kinks
NAMES = {
    "in_chans": "in_channels",
    "out_chans": "out_channels",
    "depths": "depths",
    "feat_size": "widths",
    "hidden_size": "hidden",
    "num_slices": "slices",
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
}


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    given = {
        NAMES[name]: tuple(value) if isinstance(value, list) else value
        for name, value in hparams.items()
        if name in NAMES
    }
    return from_module(SegMamba(SegMambaConfig(**given)), params, tolerance=NOISY)
