"""MHS-VM: `case` is the gated block, `case_head` one scan head, `case_net` the network."""

from typing import Any

from torch import Tensor, nn

from medmamba.nets.mhsvm import MHSVM, MHSBlock, MHSVMConfig, ScanHead
from tests.golden.adapters.views import from_channel_last
from tests.golden.case import Built, Tensors, Tolerance, from_module

# 10 x the float32 errors the SPEC measured; the fusion divides by a difference that may nearly vanish (noisy).
BLOCK = Tolerance(gradient=6e-4, noisy=True)
NETWORK = Tolerance(output=4e-4, gradient=1.3e-3, noisy=True)


class FlatHead(nn.Module):
    """A scan head whose result is (B, d, H * W), as published."""

    def __init__(self, inner: ScanHead) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x).flatten(2)
        return result


def first_name(name: str) -> str:
    """The name a tied tensor goes by with us; a case may store its gradient under either. The wrapper adds a prefix."""
    once = name.replace("x_ssproj_W", "x_ssproj.weight").replace("scanning.seq2seq_engine.", "mambaeng.")
    return once.removeprefix("vmunet.")


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    state, threshold = hparams.get("d_state", 16), hparams.get("gfu_t", 0.5)
    if "depths" in hparams:
        network = MHSVM(net_config(hparams))
        return from_module(network, params, outputs=("logits",), rename=first_name, tolerance=NETWORK)
    if "pattern" in hparams:
        head = FlatHead(ScanHead(hparams["dim_sub"], hparams["pattern"], state=state, threshold=threshold))
        return from_module(head, params, rename=lambda name: f"inner.{first_name(name)}", tolerance=BLOCK)
    block = MHSBlock(
        hparams["dim"], heads=hparams["head_num"], state=state, threshold=threshold, eps=hparams.get("eps", 1e-6)
    )
    return from_channel_last(block, params, BLOCK, rename=first_name)


def net_config(hparams: dict[str, Any]) -> MHSVMConfig:
    return MHSVMConfig(
        in_channels=hparams.get("in_chans", 3),
        out_channels=hparams.get("num_classes", 1),
        widths=tuple(hparams["dims"]),
        depths=tuple(hparams["depths"]),
        depths_decoder=tuple(hparams["depths_decoder"]),
        patch=hparams.get("patch_size", 4),
        state=hparams.get("d_state", 16),
        heads=hparams.get("head_num", 4),
        threshold=hparams.get("gfu_t", 0.5),
    )
