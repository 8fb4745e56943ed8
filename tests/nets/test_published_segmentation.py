"""The published segmentation networks beyond their golden cases: published sizes, odd images, gradients, batches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.crossd_conv import CrossDConv
from medmamba.layers.groups import contiguous, interleaved
from medmamba.layers.swin import SwinBlock
from medmamba.nets.agunet import AGUNet, AGUNetConfig, from_keras, keras_names
from medmamba.nets.attswinunet import AttSwinUNet, AttSwinUNetConfig
from medmamba.nets.daf import DAF, DAFConfig, DAFHead
from medmamba.nets.dagunet import DAGUNet, DAGUNetConfig
from medmamba.nets.dformer import DFormer, DFormerConfig
from medmamba.nets.herseg import HERSeg, HERSegConfig, HERSegEncoder
from medmamba.nets.paratranscnn import ParaTransCNN, ParaTransCNNConfig

# Measured on the official code. DAF and AttSwinUNet hold 955,412 and 7,968 values in layers that are never used.
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "daf head": (lambda: DAFHead(DAFConfig()), 17775411 - 955412),
    "attswinunet": (lambda: AttSwinUNet(AttSwinUNetConfig(mlp_ratio=2)), 34353540 - 7968),
    "paratranscnn": (lambda: ParaTransCNN(ParaTransCNNConfig()), 245468937),
    "herseg encoder, 96": (lambda: HERSegEncoder(HERSegConfig(width=96)), 957648),
    "herseg encoder, 192": (lambda: HERSegEncoder(HERSegConfig()), 3629472),
    "dformer": (lambda: DFormer(DFormerConfig(deep_supervision=True)), 50557248),
}

SWIN = AttSwinUNetConfig(
    image_px=(64, 64), width=8, depths=(2, 1, 1, 2), heads=(1, 2, 2, 2), window=4, cross_heads=2, cross_head_width=4
)
DFORMER = DFormerConfig(
    in_channels=2,
    out_channels=3,
    width=4,
    depths=(2, 2),
    heads=(1, 2),
    intervals=(3, 2),
    patch=(1, 2, 2),
    group=(2, 2, 3),
)
HERSEG = HERSegConfig(
    out_channels=3,
    width=8,
    patch_px=4,
    depths=(1, 1),
    heads=(1, 2),
    decoder_width=16,
    decoder_heads=2,
    decoder_hidden=24,
)
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "agunet": (lambda: AGUNet(AGUNetConfig(widths=(4, 6, 8), in_channels=2)), (2, 2, 8, 12, 16)),
    "agunet bare": (lambda: AGUNet(AGUNetConfig(widths=(4, 6), pyramid=False)), (2, 1, 8, 4, 6)),
    "dagunet": (lambda: DAGUNet(DAGUNetConfig(widths=(4, 6, 8))), (2, 1, 8, 12, 16)),
    "dagunet guided": (lambda: DAGUNet(DAGUNetConfig(widths=(4, 6, 8), guiding=True)), (2, 1, 8, 12, 16)),
    "attswinunet": (lambda: AttSwinUNet(SWIN), (2, 3, 75, 51)),
    "attswinunet linear": (lambda: AttSwinUNet(replace(SWIN, skip="linear_twice", qkv_bias=False)), (2, 3, 51, 40)),
    "daf": (
        lambda: DAF(
            DAFConfig(width=8, stem=4, backbone_widths=(8, 12, 16, 20), backbone_blocks=(1, 2, 1, 1), groups=2)
        ),
        (2, 3, 45, 38),
    ),
    "dformer": (lambda: DFormer(DFORMER), (2, 2, 7, 19, 22)),
    "dformer flat": (lambda: DFormer(replace(DFORMER, depths=(2, 3))), (1, 2, 2, 4, 20)),
    "herseg": (lambda: HERSeg(HERSEG), (2, 3, 19, 26)),
    "paratranscnn": (
        lambda: ParaTransCNN(
            ParaTransCNNConfig(widths=(4, 4, 8, 16), blocks=(1, 1, 2, 1), dim=12, depths=(1, 2, 1), heads=2)
        ),
        (2, 3, 45, 38),
    ),
}


def small(name: str) -> tuple[nn.Module, Tensor]:
    """A small network of that name with every parameter away from zero, and an image for it."""
    torch.manual_seed(0)
    make, shape = SMALL[name]
    network = make()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network, torch.randn(shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    make, size = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == size


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: AGUNet(AGUNetConfig(deep_supervision=True)), 18663932),
        (lambda: DAGUNet(DAGUNetConfig(deep_supervision=True)), 25727626),
    ],
    ids=["agunet", "dagunet"],
)
def test_number_of_values_as_keras_counts(make: Callable[[], nn.Module], size: int) -> None:
    with torch.device("meta"):
        state = make().state_dict()
    untracked = ("num_batches_tracked", "query_conv.weight", "key_conv.weight", "value_conv.weight")
    assert sum(value.numel() for name, value in state.items() if not name.endswith(untracked)) == size


@pytest.mark.parametrize("name", SMALL)
def test_shape_and_gradients_reach_every_parameter(name: str) -> None:
    network, image = small(name)
    scores = network.eval()(image)
    assert scores.shape == (len(image), network.config.out_channels, *image.shape[2:])  # type: ignore[union-attr]
    (scores * torch.randn_like(scores)).sum().backward()
    silent = {key.split(".")[0] for key, value in network.named_parameters() if value.grad is None}
    first_scores = {f"predict{level}" for level in range(1, 5)}  # enter DAF's training loss only
    assert silent == (first_scores if name == "daf" else set())


@pytest.mark.parametrize("name", SMALL)
def test_batched_equals_single(name: str) -> None:
    network, image = small(name)
    network.eval().double()
    with torch.no_grad():
        both, one = network(image.double()), network(image[-1:].double())
    torch.testing.assert_close(both[-1:], one)


def test_daf_loss_reaches_every_parameter() -> None:
    network, image = small("daf")
    assert isinstance(network, DAF)
    target = torch.zeros((len(image), *image.shape[2:]), dtype=torch.long)
    network.maps(image).loss(target).backward()
    assert all(value.grad is not None for value in network.parameters())


def test_keras_names_count_layers_of_a_kind() -> None:
    network = AGUNet(AGUNetConfig(widths=(4, 6, 8)))
    names = keras_names(network)
    assert names["conv3d"] == "encoder.0.block.conv1"
    assert names["conv3d_2"] == "encoder.1.image_conv"
    kernel = torch.randn(3, 3, 3, 1, 6)
    for before in (0, 19):  # layers that Keras had named in the same process
        layer = "conv3d" if before == 0 else f"conv3d_{before}"
        published = {f"{layer}/bias": torch.zeros(4), f"conv3d_{before + 2}/kernel": kernel}
        first, (ours, turned) = from_keras(network, published).values()
        assert (first[0], ours) == ("encoder.0.block.conv1.bias", "encoder.1.image_conv.weight")
        assert torch.equal(turned[5, 0], kernel[..., 0, 5])


def test_tables_and_masks_of_published_attswinunet_files_are_left_out() -> None:
    """Every second block of a stage has a mask beside its table."""
    attention = "encoder.layers.0.blocks.1.attn"
    fixed = ("encoder.layers.0.blocks.1.attn_mask", f"{attention}.relative_position_index", "patch_embed.proj.bias")
    assert {AttSwinUNet.own_name(name) for name in fixed} == {None}
    kept = (f"{attention}.qkv.bias", "encoder.patch_embed.proj.bias", "decoder.norm_up.bias")
    assert [AttSwinUNet.own_name(name) for name in kept] == list(kept)


def test_groups_come_back_and_hold_the_right_members() -> None:
    places = torch.arange(4 * 6 * 6).reshape(1, 4, 6, 6, 1)
    for groups in (contiguous((4, 6, 6), (2, 3, 2)), interleaved((4, 6, 6), (2, 3, 2))):
        assert torch.equal(groups.join(groups.split(places)), places)
    row = torch.arange(6).reshape(1, 6, 1)
    assert contiguous((6,), (3,)).split(row).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert interleaved((6,), (3,)).split(row).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    with pytest.raises(ShapeError, match="does not fall"):
        contiguous((5,), (2,))


@pytest.mark.parametrize("space", [(8, 12), (7, 10)])
def test_shifted_windows_equal_attention_told_pair_by_pair(space: tuple[int, int]) -> None:
    torch.manual_seed(0)
    window, shift = 4, 2
    block = SwinBlock(6, 2, window, shift, 2.0).double()
    x = torch.randn(1, *space, 6, dtype=torch.float64)
    rows, columns = (part.flatten() for part in torch.meshgrid(*map(torch.arange, space), indexing="ij"))
    near = []
    for axis, place in enumerate((rows, columns)):
        padded = -(-space[axis] // window) * window
        moved = (place - shift) % padded  # where the roll puts it
        wrapped = place < shift  # comes from the other end: no neighbour of what is there
        near.append((moved // window, wrapped))
    together = torch.stack([label[:, None] == label[None] for pair in near for label in pair]).all(dim=0)
    offset = [(part[:, None] - part[None] + window - 1).clamp(0, 2 * window - 2) for part in (rows, columns)]
    learned = block.attn.relative_position_bias_table[offset[0] * (2 * window - 1) + offset[1]].movedim(-1, 0)
    bias = learned.masked_fill(~together, -torch.inf)
    qkv = block.attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 3)).movedim(2, 0).transpose(2, 3)
    mixed = ((qkv[0] @ qkv[1].mT * 3**-0.5 + bias).softmax(dim=-1) @ qkv[2]).transpose(1, 2).flatten(2)
    want = block.attn.proj(mixed).reshape(x.shape)
    torch.testing.assert_close(block.attend(x), want)


def test_cross_d_kernel_without_turn_is_shifted_by_one() -> None:
    layer = CrossDConv(4, 6, 3, padding=1, groups=2)
    axis, angle = torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 1)
    want = layer.weights_3d.roll((1, 1, 1), (-3, -2, -1))[None]
    torch.testing.assert_close(layer.rotated_weights(axis, angle), want, rtol=1e-4, atol=1e-5)
    volume = torch.randn(1, 4, 5, 5, 5)
    assert layer.to_3d()(volume).shape == (1, 6, 5, 5, 5)


def test_herseg_encoder_takes_any_multiple_of_its_patch() -> None:
    encoder = HERSegEncoder(HERSEG).eval()
    assert encoder(torch.randn(2, 3, 12, 20)).shape == (2, 8, 3, 5)
    with pytest.raises(ShapeError, match="multiple of 4"):
        encoder(torch.randn(1, 3, 10, 12))


def test_wrong_settings_and_sizes_are_told() -> None:
    with pytest.raises(ShapeError, match="multiple of 4"):
        small("agunet")[0](torch.zeros(1, 2, 8, 8, 6))
    with pytest.raises(ConfigError, match="linear_twice"):
        replace(SWIN, skip="none")
    with pytest.raises(ConfigError):
        replace(DFORMER, heads=(1,))
    with pytest.raises(ConfigError, match="odd"):
        CrossDConv(2, 2, 4)
    with pytest.raises(ShapeError, match="13 or more"):
        small("daf")[0](torch.zeros(1, 3, 8, 32))
