"""The vision-Mamba networks beyond their golden cases: published sizes, odd maps, gradients, settings, names."""

import re
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from medmamba.errors import ConfigError
from medmamba.layers.ss2d import CROSS, SS2D, PatchMerging, ScanParameters, cross_merge, cross_scan
from medmamba.nets import own_name
from medmamba.nets.efficientvim import EfficientViM, EfficientViMConfig
from medmamba.nets.efficientvmamba import (
    ES2D,
    EfficientVMamba,
    EfficientVMambaConfig,
    EVSSBlock,
    skip_restore,
    skip_sample,
)
from medmamba.nets.groupmamba import GroupMamba, GroupMambaConfig, GroupMambaLayer
from medmamba.nets.hrvmamba import DeformableConv, DVSSBlock, DVSSConfig
from medmamba.nets.mhsvm import MHSVM, MHSVMConfig
from medmamba.nets.msvmamba import MSVMamba, MSVMambaConfig, SqueezeExcite
from medmamba.nets.plainmamba import DOWN, LEFT, RIGHT, START, UP, PlainMambaConfig, PlainMambaLayer, continuous_orders
from medmamba.nets.vmamba import VMamba, VMambaConfig
from medmamba.nets.vssd import VSSD, NonCausalSSD, VSSDConfig


def doubling(width: int) -> tuple[int, ...]:
    return tuple(width * 2**level for level in range(4))


# Measured on the official code (1000 classes; MHS-VM 1 class; PlainMamba one layer).
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vmamba tiny": (lambda: VMamba(VMambaConfig()), 30249064),
    "vmamba small": (lambda: VMamba(VMambaConfig(depths=(2, 2, 20, 2))), 49012840),
    "vmamba base": (lambda: VMamba(VMambaConfig(depths=(2, 2, 20, 2), widths=doubling(128))), 86614504),
    "vssd tiny": (lambda: VSSD(VSSDConfig()), 24270724),
    "msvmamba nano": (lambda: MSVMamba(MSVMambaConfig(depths=(1, 2, 5, 2), widths=doubling(48))), 6864136),
    "msvmamba micro": (lambda: MSVMamba(MSVMambaConfig(depths=(1, 2, 5, 2), widths=doubling(64))), 11879272),
    "msvmamba tiny": (lambda: MSVMamba(MSVMambaConfig()), 33046312),
    "efficientvmamba tiny": (lambda: EfficientVMamba(EfficientVMambaConfig()), 6493660),
    "efficientvmamba small": (lambda: EfficientVMamba(EfficientVMambaConfig(widths=doubling(96))), 24757456),
    "groupmamba tiny": (lambda: GroupMamba(GroupMambaConfig(distillation=True)), 23361917),
    "efficientvim M1": (lambda: EfficientViM(EfficientViMConfig()), 6679458),
    "mhsvm 4 heads": (lambda: MHSVM(MHSVMConfig()), 17257129),
    "mhsvm 3 heads": (lambda: MHSVM(MHSVMConfig(heads=3)), 17386153),
    "plainmamba L1": (lambda: PlainMambaLayer(PlainMambaConfig()), 270224),
    "plainmamba L3": (lambda: PlainMambaLayer(PlainMambaConfig(channels=448)), 1347216),
}

# Every network small, with settings other than those of the golden cases, and an input whose sides are odd.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vmamba": (
        lambda: VMamba(
            VMambaConfig(
                in_channels=2, depths=(1, 1), widths=(6, 10), state=3, ratio=1.5, gate=True, dt_rank=2, mlp_ratio=2
            )
        ),
        (2, 2, 21, 14),
    ),
    "vmamba without mlp and conv": (
        lambda: VMamba(VMambaConfig(depths=(2,), widths=(6,), conv=1, mlp_ratio=0, patch=2)),
        (2, 3, 9, 7),
    ),
    "vssd": (
        lambda: VSSD(
            VSSDConfig(
                width=4,
                depths=(1, 1),
                heads=(4, 2),
                mixers=("state_space", "attention"),
                groups=2,
                state=3,
                out_channels=4,
            )
        ),
        (2, 3, 27, 18),
    ),
    "msvmamba": (lambda: MSVMamba(MSVMambaConfig(depths=(1, 1), widths=(8, 12), state=2, patch=2)), (2, 3, 11, 14)),
    "efficientvmamba": (
        lambda: EfficientVMamba(
            EfficientVMambaConfig(depths=(2, 1, 2), widths=(8, 12, 8), patch=2, state=2, mlp_ratio=1.5)
        ),
        (2, 3, 13, 10),
    ),
    "groupmamba": (
        lambda: GroupMamba(GroupMambaConfig(stem=4, widths=(64, 80), depths=(1, 1), mlp_ratios=(2, 1), state=2)),
        (2, 3, 19, 26),
    ),
    "efficientvim": (
        lambda: EfficientViM(EfficientViMConfig(widths=(8, 16), depths=(2, 1), states=(5, 3), mlp_ratio=2)),
        (2, 3, 49, 70),
    ),
    "mhsvm": (
        lambda: MHSVM(
            MHSVMConfig(widths=(8, 16), depths=(1, 1), depths_decoder=(1, 2), state=2, heads=3, threshold=0.0)
        ),
        (2, 3, 13, 18),
    ),
    "plainmamba": (
        lambda: PlainMambaLayer(PlainMambaConfig(channels=6, state=3, conv=3, layer_scale=0.5, conv_after=True)),
        (2, 6, 5, 4),
    ),
    "hrvmamba": (lambda: DVSSBlock(DVSSConfig(channels=20, state=2, mlp_ratio=2)), (2, 20, 5, 4)),
}
# Without effect by construction: a constant along the tokens of a softmax; a decay where there is only one step.
CANCELS = {"efficientvim": r"mixer\.A$", "groupmamba": r"post_network\..*A_logs$"}


def small(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network of that name, every parameter moved off its start (some start at zero), and an input's shape."""
    torch.manual_seed(0)
    make, shape = SMALL[name]
    network = make().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network, shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    make, size = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == size


@pytest.mark.parametrize("name", SMALL)
def test_odd_maps_and_gradients_reach_every_parameter(name: str) -> None:
    network, shape = small(name)
    out = network(torch.randn(shape, dtype=torch.float64))
    assert out.shape[0] == shape[0]
    if name in ("mhsvm", "plainmamba", "hrvmamba"):
        assert out.shape[2:] == shape[2:]
    else:
        assert out.shape == (shape[0], network.config.out_channels)  # type: ignore[union-attr]
    (out * torch.randn_like(out)).sum().backward()
    silent = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert [key for key in silent if not re.search(CANCELS.get(name, "$^"), key)] == []


@pytest.mark.parametrize("name", SMALL)
def test_batched_equals_single(name: str) -> None:
    network, shape = small(name)
    network.eval()
    images = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        both, one = network(images), network(images[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-9, atol=1e-9)  # float64; the fusion of MHS-VM magnifies rounding


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"mhsvm"}))  # its fusion turns 16-bit rounding into noise
def test_autocast_stays_near(name: str) -> None:
    """bfloat16 keeps 8 bits: a few percent of the largest entry."""
    network, shape = small(name)
    network.float().eval()
    x = torch.randn(shape)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            near = network(x)
    assert float((near - exact).abs().max() / exact.abs().max()) < 0.05


def test_cross_merge_undoes_cross_scan() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(cross_merge(cross_scan(x), 4, 5), 4 * x)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 6), (1, 3, 5, 1)])
def test_scanning_in_place_is_scan_and_merge(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scans = ScanParameters(channels=20, inner=3, directions=4, state=2).double()
    x = torch.randn(shape, dtype=torch.float64)
    merged = cross_merge(scans.scan(cross_scan(x)), *shape[2:])
    torch.testing.assert_close(scans.scan_map(x, CROSS), merged, rtol=1e-12, atol=1e-12)  # float64, other sum order


def test_skip_restore_undoes_skip_sample() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(skip_restore(skip_sample(x), 4, 6), x)


def test_patch_merging_lays_the_corners_rows_first() -> None:
    merging = PatchMerging(1, 4)
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert merging(x)[0, :, 0].T.tolist() == [[0, 3, 1, 4], [2, 5, 0, 0]]


def test_directions_are_the_moves_of_the_orders() -> None:
    step = {START: (0, 0), RIGHT: (0, 1), LEFT: (0, -1), UP: (-1, 0), DOWN: (1, 0)}
    for height, width in product((1, 2, 3, 4), repeat=2):
        orders, moves = continuous_orders(height, width)
        for order, move in zip(orders.tolist(), moves.tolist(), strict=True):
            places = [divmod(position, width) for position in order]
            came = [(0, 0)] + [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
            assert [step[one] for one in move] == came


def test_deformable_convolution_without_offsets_is_a_weighed_neighbourhood() -> None:
    """Offsets 0 and one tap of weight 1 shift the map; tap 3i + j looks at (x - 1 + i, y - 1 + j)."""
    convolution = DeformableConv(4, 2).double()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    assert not convolution(x).any()  # born silent
    eye = torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        convolution.value_proj.weight.copy_(eye)
        convolution.output_proj.weight.copy_(eye)
        convolution.offset_mask.bias[[18 + 5, 27 + 18 + 5]] = 1  # tap 5: i = 1, j = 2, one row below
    expected = torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], dim=2)
    torch.testing.assert_close(convolution(x), expected)


def test_wide_blocks_look_at_a_neighbourhood_for_their_offsets() -> None:
    names = DVSSBlock(DVSSConfig(channels=80, mlp_ratio=1)).state_dict()
    assert names["op.conv2d.offset_mask_dw.weight"].shape == (160, 1, 3, 3)
    assert "op.conv2d.offset_mask_dw.weight" not in small("hrvmamba")[0].state_dict()


def test_group_mamba_with_two_heads() -> None:
    config = GroupMambaConfig(stem=4, widths=(16,), depths=(1,), mlp_ratios=(1,), out_channels=3, distillation=True)
    network = GroupMamba(config)
    x = torch.randn(2, 3, 8, 8)
    assert [tuple(one.shape) for one in network.train()(x)] == [(2, 3), (2, 3)]
    assert network.eval()(x).shape == (2, 3)


def test_efficientvim_with_two_votes() -> None:
    torch.manual_seed(0)
    config = EfficientViMConfig(widths=(8, 8), depths=(1, 1), states=(2, 2), out_channels=3, distillation=True)
    network = EfficientViM(config)
    x = torch.randn(2, 3, 32, 32)
    assert [tuple(one.shape) for one in network.train()(x)] == [(2, 3), (2, 3)]
    network.eval()
    mean = network(x)
    assert network.weights_dist is not None
    assert network.heads_dist is not None
    network.weights.data, network.heads = network.weights_dist.data, network.heads_dist
    assert not torch.allclose(network(x), mean)  # the second vote alone


def test_squeezes_of_narrow_maps_leave_the_biases() -> None:
    """Fewer than 16 (8) channels leave no unit between: as published, one learned number a channel."""
    layer, gate = GroupMambaLayer(8), EVSSBlock(6, ES2D(6, state=1)).se
    assert layer.fc1.weight.shape == (0, 8)
    t = torch.randn(1, 6, 3, 4)
    torch.testing.assert_close(gate(t), t * gate.channel_select.bias.sigmoid()[:, None, None])
    before = layer(torch.ones(1, 8, 2, 3).cumsum(1))
    layer.fc2.bias.data[0] = 9.0
    assert not torch.allclose(layer(torch.ones(1, 8, 2, 3).cumsum(1)), before)
    torch.testing.assert_close(SqueezeExcite(6)(t), t / 2)  # without biases: the sigmoid of nothing


def test_mhsvm_takes_one_channel_and_leaves_repeated_names_out() -> None:
    network, _ = small("mhsvm")
    assert network(torch.randn(1, 1, 8, 9, dtype=torch.float64)).shape == (1, 1, 8, 9)
    assert own_name(MHSVM, "vmunet.final_conv.bias") == "final_conv.bias"
    assert own_name(MHSVM, "layers.0.blocks.0.self_attention.mhs.x_ssproj_W") is None
    assert own_name(MHSVM, "layers.0.blocks.0.self_attention.mhs.scanhead_C.scanning.seq2seq_engine.Ds") is None


def test_negative_weights_turn_the_state() -> None:
    torch.manual_seed(0)
    mixer = NonCausalSSD(4, heads=2, state=3).double()
    mixer.D.data.zero_()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    plus = mixer(x)
    mixer.positive = False
    mixer.norm.weight.data.neg_()  # the norm of the negated state
    torch.testing.assert_close(mixer(x), plus)


WRONG: dict[str, Callable[[], object]] = {
    "stages": lambda: VMambaConfig(depths=(1,), widths=(4, 8)),
    "patch": lambda: VMambaConfig(patch=3),
    "ss2d": lambda: SS2D(4, state=0),
    "mixers": lambda: VSSDConfig(mixers=("state_space",) * 3 + ("convolution",)),
    "vssd stages": lambda: VSSDConfig(depths=(1,)),
    "heads": lambda: NonCausalSSD(4, heads=3, state=2),
    "group channels": lambda: GroupMambaLayer(18),
    "group stages": lambda: GroupMambaConfig(depths=(1,)),
    "shuffle": lambda: DVSSConfig(channels=6),
    "deformable groups": lambda: DeformableConv(5, 2),
    "mhs heads": lambda: MHSVMConfig(heads=2),
    "mhs widths": lambda: MHSVMConfig(widths=(8, 16, 24, 48)),
    "mhs stages": lambda: MHSVMConfig(depths=(1,)),
    "efficientvim stem": lambda: EfficientViMConfig(widths=(7, 16, 16)),
    "efficientvim stages": lambda: EfficientViMConfig(depths=(1,)),
    "msvmamba stages": lambda: MSVMambaConfig(depths=(1,)),
    "efficientvmamba stages": lambda: EfficientVMambaConfig(depths=(1,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_told(name: str) -> None:
    with pytest.raises(ConfigError):
        WRONG[name]()


def test_gate_takes_part_in_the_atrous_block() -> None:
    block = EVSSBlock(8, ES2D(8, state=1), mlp_ratio=0.0)
    assert "mlp.fc1.weight" not in block.state_dict()
    assert block(torch.randn(1, 8, 3, 5)).shape == (1, 8, 3, 5)
