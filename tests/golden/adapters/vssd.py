"""VSSD: `case` is the block, `case_groups` the mixer, `case_net` the classifier."""

from typing import Any

from medmamba.nets.vssd import VSSD, NonCausalSSD, VSSDBlock, VSSDConfig, block
from tests.golden.adapters.views import from_tokens
from tests.golden.case import Built, Tensors, from_module

MIXERS = {"mamba2": "state_space", "standard": "attention"}


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    if "depths" in hparams:
        return from_module(VSSD(net_config(hparams)), params)
    if "d_model" in hparams:
        return from_tokens(mixer(hparams), params, hparams["H"], hparams["W"])
    return from_tokens(one_block(hparams), params, hparams["H"], hparams["W"])


def mixer(hparams: dict[str, Any]) -> NonCausalSSD:
    channels, expand = hparams["d_model"], hparams.get("expand", 2)
    return NonCausalSSD(
        channels,
        heads=int(expand * channels) // hparams["headdim"],
        state=hparams.get("d_state", 64),
        expand=expand,
        groups=hparams.get("ngroups", 1),
        positive=positive(hparams),
    )


def one_block(hparams: dict[str, Any]) -> VSSDBlock:
    kind = MIXERS[hparams.get("attn_type", "mamba2")]
    return block(VSSDConfig(**shared(hparams)), hparams["dim"], hparams["num_heads"], kind)


def net_config(hparams: dict[str, Any]) -> VSSDConfig:
    stages = len(hparams["depths"])
    kinds = hparams.get("attn_types", ["mamba2"] * (stages - 1) + ["standard"])
    return VSSDConfig(
        in_channels=hparams.get("in_chans", 3),
        out_channels=hparams.get("num_classes", 1000),
        width=hparams["embed_dim"],
        depths=tuple(hparams["depths"]),
        heads=tuple(hparams["num_heads"]),
        mixers=tuple(MIXERS[kind] for kind in kinds),
        **shared(hparams),
    )


def shared(hparams: dict[str, Any]) -> dict[str, Any]:
    """What block and network both name."""
    return {
        "state": hparams.get("d_state", 64),
        "expand": hparams.get("ssd_expansion", 2),
        "groups": hparams.get("ssd_ngroups", 1),
        "positive": positive(hparams),
        "mlp_ratio": hparams.get("mlp_ratio", 4.0),
    }


def positive(hparams: dict[str, Any]) -> bool:
    """The positive-dA switch, whose official name is spelled in two ways."""
    return all(bool(value) for name, value in hparams.items() if "posit" in name)
