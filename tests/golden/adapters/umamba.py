"""U-Mamba: the variant "Enc" or "Bot" is in the hyper-parameters; outputs y0 (finest, also `y`), y1, ..."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from medmamba.nets.umamba import UMamba, UMambaConfig
from tests.golden.case import Built, Tensors, Tolerance, from_module

NOISY = Tolerance(noisy=True)  # instance norms over a handful of voxels, then LeakyReLU kinks
VARIANTS = {"Enc": "encoder", "Bot": "bottleneck"}


def build(stem: str, hparams: dict[str, Any], params: Tensors, inputs: Tensors) -> Built:
    stages = hparams["n_stages"]
    space = next(iter(inputs.values())).shape[2:]
    deep = hparams.get("deep_supervision", False)
    config = UMambaConfig(
        in_channels=hparams["input_channels"],
        out_channels=hparams["num_classes"],
        mamba=VARIANTS[hparams["variant"]],
        widths=per_stage(hparams["features_per_stage"], stages),
        kernels=per_axis(hparams["kernel_sizes"], stages, len(space)),
        strides=per_axis(hparams["strides"], stages, len(space)),
        blocks=per_stage(hparams["n_conv_per_stage"], stages),
        decoder_blocks=per_stage(hparams["n_conv_per_stage_decoder"], stages - 1),
        image_px=tuple(hparams.get("input_size", space)),
        deep_supervision=deep,
        **{name: hparams[name] for name in ("d_state", "d_conv", "expand") if name in hparams},
    )
    names = tuple(f"y{level}" for level in range(stages - 1)) if deep else ("y0",)
    built = from_module(UMamba(config), params, outputs=names, tolerance=NOISY)

    def forward(named: Tensors) -> dict[str, Tensor]:
        scores = dict(built.forward(named))
        return scores | {"y": scores["y0"]}

    return replace(built, forward=forward)


def per_stage(value: Any, stages: int) -> tuple[int, ...]:
    """One number per stage; the official constructor also takes a single one."""
    return (value,) * stages if isinstance(value, int) else tuple(value)


def per_axis(value: Any, stages: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """One number per stage and axis."""
    rows = [value] * stages if isinstance(value, int) else value
    return tuple((row,) * rank if isinstance(row, int) else tuple(row) for row in rows)
