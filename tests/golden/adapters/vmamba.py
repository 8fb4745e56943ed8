"""VMamba: `case` is the VSS block, `case_ss2d_z` the bare SS2D, `case_net` the classifier."""

from typing import Any

from medmamba.layers.ss2d import SS2D
from medmamba.nets.vmamba import VMamba, VMambaConfig, VSSBlock
from tests.golden.adapters.views import from_channel_last
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if "depths" in hparams:
        return from_module(VMamba(net_config(hparams)), params)
    load = from_module if hparams.get("channel_first", hparams.get("norm") == "ln2d") else from_channel_last
    if "d_model" in hparams:
        op = SS2D(hparams["d_model"], **scan_settings(hparams))
        return load(op, params)
    width = hparams["hidden_dim"]
    block = VSSBlock(width, SS2D(width, **scan_settings(hparams)), mlp_ratio=hparams.get("mlp_ratio", 4.0))
    return load(block, params)


def scan_settings(hparams: dict[str, Any]) -> dict[str, Any]:
    """Settings of SS2D by our names; the bare operator and the block spell them differently."""

    def setting(name: str, default: object) -> Any:
        return hparams.get(f"ssm_{name}", hparams.get(f"d_{name}", hparams.get(name, default)))

    rank = setting("dt_rank", "auto")
    return {
        "state": setting("state", hparams.get("ssm_d_state", 16)),
        "ratio": setting("ratio", 2.0),
        "dt_rank": None if rank in ("auto", None) else int(rank),
        "conv": setting("conv", 3),
        "conv_bias": setting("conv_bias", True),
        "gate": "noz" not in hparams.get("forward_type", "v05"),
    }


def net_config(hparams: dict[str, Any]) -> VMambaConfig:
    return VMambaConfig(
        in_channels=hparams.get("in_chans", 3),
        out_channels=hparams.get("num_classes", 1000),
        depths=tuple(hparams["depths"]),
        widths=tuple(hparams["dims"]),
        patch=hparams.get("patch_size", 4),
        mlp_ratio=hparams.get("mlp_ratio", 4.0),
        **scan_settings(hparams),
    )
