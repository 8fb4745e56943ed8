"""Contract of the networks table: each entry is trained two steps by name; dense ones from a run file, to a bundle.

A new network needs one line in SETTINGS (small settings), nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medmamba.nets import CLASSIFIERS, PAIRED
from pipelines.config import TrainRun
from pipelines.learning.change_losses import binary_change_loss, semantic_change_loss
from pipelines.learning.sampling import Batch
from pipelines.learning.train import learn, train
from pipelines.networks import NETWORKS
from pipelines.serving.predict import Predictor
from tests.pipelines.cohort_maker import run_values, write_cohort

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PLANE, VOLUME = (1, 16, 16), (16, 16, 16)
PAIR = {"depths": [1] * 4, "widths": [16] * 4, "drop_path": 0.0}
SETTINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "agunet": (VOLUME, {"widths": [4, 6, 8]}),
    "attswinunet": (
        (1, 32, 32),
        {"width": 8, "depths": [1] * 4, "heads": [1, 1, 2, 2], "window": 4, "cross_heads": 2, "cross_head_width": 4},
    ),
    "awmambabcd": ((1, 32, 32), {**PAIR, "width": 8}),
    "awmambascd": ((1, 32, 32), {**PAIR, "width": 8}),
    "daf": (PLANE, {"width": 8, "stem": 4, "backbone_widths": [8] * 4, "backbone_blocks": [1] * 4, "groups": 2}),
    "dagunet": (VOLUME, {"widths": [4, 6, 8]}),
    "dformer": (
        VOLUME,
        {"width": 4, "depths": [1, 1], "heads": [1, 2], "intervals": [2, 2], "patch": [1, 2, 2], "group": [2, 2, 2]},
    ),
    "dynunet": (
        VOLUME,
        {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]},
    ),
    "efficientvim": ((1, 64, 64), {"widths": [8, 8, 8], "depths": [1, 1, 1], "states": [4, 4, 4]}),
    "efficientvmamba": ((1, 32, 32), {"widths": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "state": 2}),
    "groupmamba": ((1, 32, 32), {"stem": 4, "widths": [16, 16], "depths": [1, 1], "mlp_ratios": [1, 1]}),
    "herseg": (
        PLANE,
        {
            "width": 8, "patch_px": 4, "depths": [1, 1], "heads": [1, 2], "decoder_width": 16, "decoder_heads": 2,
            "decoder_hidden": 24,
        },
    ),
    "mamba_unet": (VOLUME, {"widths": [8, 16], "depths": [1, 1]}),
    "mambabcd": ((1, 32, 32), {**PAIR, "width": 8}),
    "mambafcs": ((1, 32, 32), PAIR),
    "mambaout": ((1, 32, 32), {"widths": [8, 12], "depths": [1, 1], "kernel": 3}),
    "mambascd": ((1, 32, 32), {**PAIR, "width": 8}),
    "mhsvm": (
        (1, 32, 32),
        {"widths": [6, 12], "depths": [1, 1], "depths_decoder": [1, 1], "state": 2, "heads": 3},
    ),
    "msvmamba": ((1, 32, 32), {"widths": [8, 16], "depths": [1, 1]}),
    "paratranscnn": (
        (1, 32, 32),
        {"widths": [4, 4, 8, 16], "blocks": [1, 1, 1, 1], "dim": 12, "depths": [1, 1, 1], "heads": 2},
    ),
    "reversible_mbconv_unet": (VOLUME, {"widths": [4, 6], "depths": [1, 1], "expand": 2}),
    "segmamba": (
        (32, 32, 32),
        {"widths": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "hidden": 8, "slices": [4, 4, 2, 2], "d_state": 2},
    ),
    "segresnet": (VOLUME, {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}),
    "swinunetr": ((1, 64, 64), {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}),
    "umamba": (
        VOLUME,
        {
            "widths": [4, 6], "kernels": [[3] * 3] * 2, "strides": [[1] * 3, [2] * 3], "blocks": [1, 1],
            "decoder_blocks": [1], "d_state": 2,
        },
    ),
    "unet": (VOLUME, {"channels": [4, 8], "strides": [2]}),
    "vim": ((1, 32, 32), {"image_px": [32, 32], "depth": 1, "width": 8, "d_state": 2}),
    "vmamba": ((1, 32, 32), {"widths": [8, 16], "depths": [1, 1]}),
    "vssd": ((1, 32, 32), {"width": 8, "depths": [1] * 4, "heads": [1, 1, 2, 2], "state": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), cases=2, size=16)


def test_every_network_is_in_this_table() -> None:
    assert set(SETTINGS) == set(NETWORKS)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - CLASSIFIERS - PAIRED))
def test_two_steps_from_a_run_file_give_a_bundle_that_loads(name: str, manifest: Path, tmp_path: Path) -> None:
    window, network = SETTINGS[name]
    preprocessing = {"channels": [{"role": "t1"}], "window": list(window)}
    settings = {"architecture": name, "network": network, "preprocessing": preprocessing}
    run = {**run_values(manifest, tmp_path), **settings, "epochs": 1, "steps_per_epoch": 2, "validation_share": 0}
    predictor = Predictor.load(train(TrainRun.check(run)), device="cpu")
    with torch.inference_mode():
        assert predictor.network(torch.zeros(1, 1, *window)).shape == (1, 3, *window)


def lesson(name: str, plane: tuple[int, ...]) -> tuple[int, int, torch.Tensor, Loss]:
    """Channels in and out, labels of two images and the loss of a network that no run file trains yet."""
    if name in CLASSIFIERS:
        return 1, 2, torch.tensor([0, 1]), F.cross_entropy
    labels = torch.randint(0, 2, (2, 3, *plane))
    return (2, 2, labels, binary_change_loss) if name.endswith("bcd") else (2, 8, labels, semantic_change_loss)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS | PAIRED))
def test_two_steps_change_every_tensor_that_learns(name: str) -> None:
    torch.manual_seed(0)
    window, settings = SETTINGS[name]
    channels, out, labels, loss = lesson(name, window[1:])
    network = NETWORKS[name]({**settings, "in_channels": channels, "out_channels": out})
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    batch = Batch(image=torch.randn(2, channels, *window[1:]), labels=labels, cases=("a", "b"))
    for step in range(2):
        learn(network, optimizer, loss, batch, torch.device("cpu"), amp=False, debug=False, step=step)
    same = [key for key, value in network.named_parameters() if value.any() and torch.equal(value, before[key])]
    assert not same
