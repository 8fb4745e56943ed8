"""MSVMamba: `case` is the block, `case_net` the classifier."""

from typing import Any

from medmamba.nets.msvmamba import MSVMamba, MSVMambaConfig, MSVSSBlock
from tests.golden.adapters.views import from_channel_last
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    rank = hparams.get("ssm_dt_rank", "auto")
    scan = {
        "state": hparams.get("ssm_d_state", 16),
        "ratio": hparams.get("ssm_ratio", 2.0),
        "dt_rank": None if rank in ("auto", None) else int(rank),
    }
    if "depths" not in hparams:
        return from_channel_last(MSVSSBlock(hparams["hidden_dim"], **scan), params)
    _, channels, patch, _ = params["patch_embed.0.weight"].shape  # hparams need not tell them
    config = MSVMambaConfig(
        in_channels=channels,
        out_channels=hparams.get("num_classes", 1000),
        depths=tuple(hparams["depths"]),
        widths=tuple(hparams["dims"]),
        patch=patch,
        **scan,
    )
    return from_module(MSVMamba(config), params)
