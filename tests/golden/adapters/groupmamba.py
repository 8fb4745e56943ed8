"""GroupMamba: `case` is the block, `case_nonsquare` the layer, `case_net` the classifier."""

from typing import Any

from medmamba.nets.groupmamba import Block, GroupMamba, GroupMambaConfig, GroupMambaLayer
from tests.golden.adapters.views import from_tokens
from tests.golden.case import Built, Tensors, from_module


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    scan = {"state": hparams.get("d_state", 1), "expand": hparams.get("expand", 1)}
    if "depths" in hparams:
        heads = {name.split(".")[0] for name in params if "head" in name} - {"head"}
        config = GroupMambaConfig(
            in_channels=hparams.get("in_chans", 3),
            out_channels=hparams.get("num_classes", 1000),
            stem=hparams["stem_hidden_dim"],
            widths=tuple(hparams["embed_dims"]),
            depths=tuple(hparams["depths"]),
            mlp_ratios=tuple(hparams["mlp_ratios"]),
            distillation=bool(heads),
            **scan,
        )
        return from_module(GroupMamba(config), params)
    space = hparams["H"], hparams["W"]
    if "input_dim" in hparams:
        layer = GroupMambaLayer(hparams["input_dim"], hparams.get("output_dim"), conv=hparams.get("d_conv", 3), **scan)
        return from_tokens(layer, params, *space)
    return from_tokens(Block(hparams["dim"], mlp_ratio=hparams["mlp_ratio"], **scan), params, *space)
