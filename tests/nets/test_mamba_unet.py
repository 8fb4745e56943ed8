"""The Mamba U-Net: any size in, the same size out; its scan is the definition; every parameter learns."""

from __future__ import annotations

import pytest
import torch

from medmamba.errors import ConfigError, ShapeError
from medmamba.nets import network_class
from medmamba.nets.mamba_unet import MambaUNet, RasterScan
from medmamba.ops.scan import scan_sequential

SMALL = {"widths": (4, 6), "depths": (1, 1), "state": 2, "mixer_from": 0}


def small(**settings: object) -> MambaUNet:
    torch.manual_seed(0)
    return MambaUNet(MambaUNet.Config(**{**SMALL, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize("space", [(8, 8), (7, 5), (1, 3), (9, 8, 4), (3, 5, 1)])
@pytest.mark.parametrize("mixer", ["s6", "none"])
def test_any_size_gives_the_same_size(space: tuple[int, ...], mixer: str) -> None:
    network = small(spatial_dims=len(space), in_channels=2, out_channels=3, mixer=mixer)
    assert network(torch.randn(2, 2, *space)).shape == (2, 3, *space)


def test_it_is_in_the_table() -> None:
    assert network_class("mamba_unet") is MambaUNet


def test_every_parameter_gets_a_gradient_and_batched_equals_single() -> None:
    network = small(spatial_dims=3, widths=(4, 4, 4), depths=(1, 2, 1), strides=((1, 2, 2), (2, 2, 1)))
    x = torch.randn(2, 1, 5, 6, 7)
    y = network(x)
    y.square().mean().backward()
    assert [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    single = torch.cat([network(x[:1]), network(x[1:])])
    torch.testing.assert_close(y, single, rtol=1e-5, atol=1e-6)  # float32, sums of a few hundred terms


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scan_is_the_definition_over_the_turned_raster(axis: int) -> None:
    torch.manual_seed(1)
    scan = RasterScan(3, state=2, axis=axis).double()
    x = torch.randn(2, 3, 2, 4, 3, dtype=torch.float64)
    order = [(axis + i) % 3 + 1 for i in range(3)]
    tokens = x.permute(0, *order, 4).flatten(1, 3)
    expected = (one_way(scan, tokens, 0) + one_way(scan, tokens.flip(1), 1).flip(1)).view(x.permute(0, *order, 4).shape)
    torch.testing.assert_close(scan(x), expected.permute(0, *[order.index(a) + 1 for a in (1, 2, 3)], 4))


def one_way(scan: RasterScan, tokens: torch.Tensor, way: int) -> torch.Tensor:
    """Tokens (B, L, D) through the sequential definition with the parameters of one direction."""
    width, state, rank = scan.width, scan.state, scan.rank
    part = slice(way * width, (way + 1) * width)
    projected = tokens @ scan.project.weight.chunk(2)[way].T
    low, b, c = projected.mT.split([rank, state, state], dim=1)
    y = scan_sequential(
        tokens.mT,
        scan.step[way] @ low,
        -scan.A_log[part].exp(),
        b,
        c,
        delta_bias=scan.step_bias[part],
        delta_softplus=True,
    )
    assert isinstance(y, torch.Tensor)
    return y.mT


def test_the_scan_sees_the_whole_image_and_none_does_not() -> None:
    """A far corner changes when the near one does; two 3 x 3 convolutions alone reach 2 cells."""
    for mixer, reached in (("s6", True), ("none", False)):
        network = small(spatial_dims=2, widths=(4,), depths=(1,), mixer=mixer).double()
        x = torch.randn(1, 1, 24, 24, dtype=torch.float64)
        moved = x.clone()
        moved[..., 0, 0] += 1
        assert bool((network(x) - network(moved))[..., -1, -1].abs().max() > 0) is reached


def test_scan_stays_float32_under_autocast() -> None:
    scan = RasterScan(4, state=2, axis=0)
    x = torch.randn(1, 3, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scan(x)
    assert torch.equal(inside, scan(x))  # bit for bit what it is without autocast


def test_save_and_load_gives_the_same_function() -> None:
    a, b = small(spatial_dims=2), MambaUNet(MambaUNet.Config(**{**SMALL, "spatial_dims": 2}))  # type: ignore[arg-type]
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 1, 9, 9)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize(
    "wrong",
    [{"spatial_dims": 4}, {"mixer": "s7"}, {"widths": (4,)}, {"strides": ((2, 2),)}, {"state": 0}, {"out_channels": 0}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        small(**wrong)


def test_wrong_input_is_refused_with_its_shape() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 2, 8, 8\)"):
        small(spatial_dims=2)(torch.zeros(1, 2, 8, 8))
