"""Vim, MambaOut, U-Mamba and SegMamba beyond the golden cases: ranks, odd sizes, gradients, options, errors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.drop_path import DropPath, drop_rates
from medmamba.nets import NETWORKS, network_class, own_name
from medmamba.nets.mambaout import MambaOut, MambaOutConfig
from medmamba.nets.segmamba import SegMamba, SegMambaConfig
from medmamba.nets.umamba import UMamba, UMambaConfig
from medmamba.nets.vim import Vim, VimConfig


def umamba_config(rank: int, mamba: str = "encoder", **changes: object) -> UMambaConfig:
    start = UMambaConfig(
        widths=(4, 6, 8),
        kernels=((3,) * rank,) * 3,
        strides=((1,) * rank, *((2,) * rank,) * 2),
        blocks=(2, 2, 2),
        decoder_blocks=(1, 2),
        image_px=(16,) * rank,
        mamba=mamba,
    )
    return replace(start, **changes)  # type: ignore[arg-type]


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vim": (
        lambda: Vim(VimConfig(image_px=(24, 16), patch_px=8, stride_px=4, depth=2, width=8, out_channels=3)),
        (2, 3, 24, 16),
    ),
    "mambaout": (
        lambda: MambaOut(MambaOutConfig(depths=(1, 2), widths=(8, 12), kernel=3, out_channels=3)),
        (2, 3, 19, 14),
    ),
    "mambaout 3d": (
        lambda: MambaOut(MambaOutConfig(depths=(1, 1), widths=(8, 12), spatial_dims=3, out_channels=3)),
        (2, 3, 9, 8, 11),
    ),
    "umamba 2d": (lambda: UMamba(umamba_config(2)), (2, 1, 19, 13)),
    "umamba 3d": (lambda: UMamba(umamba_config(3, "bottleneck")), (1, 1, 9, 8, 11)),
    "segmamba": (
        lambda: SegMamba(SegMambaConfig(depths=(1,) * 4, widths=(4, 4, 6, 8), hidden=8, slices=(8, 4, 2, 1))),
        (1, 1, 32, 16, 32),
    ),
}


def small(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network of that name with seeded parameters, and the shape of an input."""
    torch.manual_seed(0)
    make, shape = SMALL[name]
    return make(), shape


@pytest.mark.parametrize("name", SMALL)
def test_shape_and_gradients_reach_every_parameter(name: str) -> None:
    network, shape = small(name)
    out = network(torch.randn(shape))
    dense = isinstance(network, UMamba | SegMamba)
    assert out.shape == (shape[0], network.config.out_channels, *(shape[2:] if dense else ()))  # type: ignore[union-attr]
    (out * torch.randn_like(out)).sum().backward()
    silent = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == [f"decoder.seg_layers.0.{part}" for part in ("weight", "bias")] * isinstance(network, UMamba)


@pytest.mark.parametrize("name", SMALL)
def test_batched_equals_single(name: str) -> None:
    network, shape = small(name)
    network.eval()
    images = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, one = network(images), network(images[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-4)  # instance norms of 8 voxels magnify rounding


def test_table_names_networks() -> None:
    for name in NETWORKS:
        assert issubclass(network_class(name), nn.Module)
    with pytest.raises(ConfigError, match=r"known: .*vim"):
        network_class("no such network")


def test_deep_supervision_gives_every_level_finest_first() -> None:
    network = UMamba(umamba_config(2, deep_supervision=True))
    levels = network(torch.zeros(1, 1, 16, 16))
    assert [tuple(level.shape) for level in levels] == [(1, 2, 16, 16), (1, 2, 8, 8)]


def test_transposed_stage_takes_its_own_size_only() -> None:
    config = umamba_config(2, image_px=(8, 8))  # the last stage has 4 positions and 8 channels
    network = UMamba(config)
    assert [layer.positions for layer in network.encoder.mamba_layers] == [None, None, 4]
    with pytest.raises(ShapeError, match="made for 4 positions"):
        network(torch.zeros(1, 1, 16, 16))


def test_deeper_half_has_one_block_as_published() -> None:
    config = umamba_config(2)
    assert [config.encoder_blocks(stage) for stage in range(3)] == [2, 2, 1]
    assert [config.decoder_block_count(level) for level in range(2)] == [1, 2]


def test_repeated_tensors_of_published_umamba_files_are_left_out() -> None:
    network, _ = small("umamba 2d")
    ours = set(network.state_dict())
    repeats = {f"decoder.{name}" for name in ours if name.startswith("encoder.")}
    repeats |= {name.replace(".conv1.conv.", ".conv1.all_modules.0.") for name in ours if ".conv1.conv." in name}
    assert len(repeats) > 20
    assert {own_name(UMamba, name) for name in ours | repeats} == {None, *ours}
    assert own_name(Vim, "head.weight") == "head.weight"


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation() -> None:
    assert drop_rates(0.2, 3) == pytest.approx([0.0, 0.1, 0.2])
    torch.manual_seed(0)
    drop, ones = DropPath(0.25), torch.ones(20_000, 2)
    got: Tensor = drop(ones)
    assert got.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (got[:, 0] == got[:, 1]).all()
    assert float(got.mean()) == pytest.approx(1.0, abs=0.02)  # standard error 0.004
    assert drop.eval()(ones) is ones


def test_wrong_settings_and_sizes_are_told() -> None:
    with pytest.raises(ConfigError, match="conv_ratio"):
        MambaOut(MambaOutConfig(widths=(8,), depths=(1,), conv_ratio=4.0))
    with pytest.raises(ConfigError, match="one depth per width"):
        MambaOut(MambaOutConfig(widths=(8, 8), depths=(1,)))
    for changes in ({"mamba": "both"}, {"blocks": (1,)}, {"image_px": None}, {"kernels": ((3,),) * 3}):
        with pytest.raises(ConfigError):
            umamba_config(2, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Vim(VimConfig(image_px=(8, 8)))
    with pytest.raises(ShapeError, match="24, 16"):
        small("vim")[0](torch.zeros(1, 3, 16, 24))
    with pytest.raises(ShapeError, match="multiple of 16"):
        small("segmamba")[0](torch.zeros(1, 1, 16, 16, 20))
