"""Ways up in a U-Net's decoder: any rank and size, attention stays in its window, padding is not attended to."""

import pytest
import torch
import torch.nn.functional as F

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.upsampling import UPSAMPLINGS, WindowUpsampling
from medmamba.nets.umamba import UMamba, UMambaConfig


@pytest.mark.parametrize("name", UPSAMPLINGS)
@pytest.mark.parametrize(("coarse", "fine", "stride"), [((5, 6), (9, 12), (2, 2)), ((3, 5, 4), (3, 9, 7), (1, 2, 2))])
def test_size_of_the_skip_and_gradients(
    name: str, coarse: tuple[int, ...], fine: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = UPSAMPLINGS[name](6, 4, stride)
    out = layer(torch.randn(2, 6, *coarse), torch.randn(2, 4, *fine))
    assert out.shape == (2, 4, *fine)
    (out * torch.randn_like(out)).sum().backward()
    silent = [key for key, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_attention_stays_in_its_window() -> None:
    torch.manual_seed(0)
    layer = WindowUpsampling(6, 4, (2, 2), side=2).double()
    torch.nn.init.zeros_(layer.conv.weight)  # the linear way reaches over the border
    x = torch.randn(1, 6, 6, 4, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(1, 4, 12, 8, dtype=torch.float64, requires_grad=True)
    layer(x, skip)[0, :, 5, 2].sum().backward()  # coarse window: rows 2 and 3, columns 0 and 1
    assert x.grad is not None
    assert skip.grad is not None
    felt = x.grad[0].abs().sum(0) > 0
    assert felt[2:4, :2].all()
    assert felt.sum() == 4
    assert (skip.grad[0].abs().sum(0) > 0).nonzero().tolist() == [[5, 2]]


def test_padding_is_not_attended_to() -> None:
    """A last window of one real cell gives that cell's value, whatever is asked."""
    torch.manual_seed(0)
    layer = WindowUpsampling(6, 4, (2, 2), side=4).double()
    x, skip = torch.randn(1, 6, 5, 5, dtype=torch.float64), torch.randn(1, 4, 10, 9, dtype=torch.float64)
    value = layer.proj(layer.key_value(layer.norm_coarse(x[0, :, 4, 4]))[4:])
    linear = F.interpolate(layer.conv(x), (10, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close((layer(x, skip) - linear)[0, :, 8:, 8:], value[:, None, None].expand(4, 2, 1))


def test_too_large_a_skip_is_refused() -> None:
    with pytest.raises(ShapeError, match="larger"):
        WindowUpsampling(6, 4, (2, 2))(torch.zeros(1, 6, 4, 4), torch.zeros(1, 4, 9, 8))


def test_u_net_takes_either() -> None:
    settings = {"widths": (4, 6, 8), "kernels": ((3, 3),) * 3, "strides": ((1, 1), (2, 2), (2, 2)), "blocks": (1, 1, 1)}
    config = UMambaConfig(
        **settings,  # type: ignore[arg-type]
        decoder_blocks=(1, 1),
        mamba="bottleneck",
        image_px=None,
        upsampling="window_attention",
    )
    network = UMamba(config)
    assert network(torch.randn(1, 1, 19, 13)).shape == (1, 2, 19, 13)
    assert any("key_value" in name for name, _ in network.named_parameters())
    with pytest.raises(ConfigError, match="known: nearest, window_attention"):
        UMambaConfig(upsampling="x")
