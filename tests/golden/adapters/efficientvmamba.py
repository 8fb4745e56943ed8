"""EfficientVMamba: `case` is the EVSS block, `case_odd` the ES2D mixer, `case_net` the classifier."""

from typing import Any

from medmamba.errors import ConfigError
from medmamba.nets.efficientvmamba import ES2D, STEP, EfficientVMamba, EfficientVMambaConfig, EVSSBlock
from tests.golden.adapters.views import from_channel_last
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if hparams.get("step_size", STEP) != STEP:
        raise ConfigError(f"step_size {hparams['step_size']}: only {STEP} covers every pixel")
    if "depths" in hparams:
        return from_module(EfficientVMamba(net_config(hparams)), params)
    channels = hparams.get("d_model", hparams.get("hidden_dim"))
    rank = hparams.get("ssm_dt_rank", hparams.get("dt_rank", "auto"))
    op = ES2D(
        channels,
        state=hparams.get("ssm_d_state", hparams.get("d_state", 16)),
        ratio=hparams.get("ssm_ratio", 2.0),
        dt_rank=None if rank == "auto" else rank,
        conv=hparams.get("ssm_conv", hparams.get("d_conv", 3)),
        conv_bias=hparams.get("ssm_conv_bias", hparams.get("conv_bias", True)),
    )
    if "d_model" in hparams:
        return from_channel_last(op, params)
    return from_channel_last(EVSSBlock(channels, op, mlp_ratio=hparams.get("mlp_ratio", 0.0)), params)


def net_config(hparams: dict[str, Any]) -> EfficientVMambaConfig:
    """The published network hands neither d_state nor dt_rank on to its blocks: always 16 and automatic."""
    return EfficientVMambaConfig(
        in_channels=hparams.get("in_chans", 3),
        out_channels=hparams.get("num_classes", 1000),
        depths=tuple(hparams["depths"]),
        widths=tuple(hparams["dims"]),
        patch=hparams.get("patch_size", 4),
        ratio=hparams.get("ssm_ratio", 2.0),
        mlp_ratio=hparams.get("mlp_ratio", 0.0),
    )
