"""Token mixers: what they may see, their options, and the errors of wrong sizes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.gla import GatedLinearAttention, GatedLinearAttentionConfig
from medmamba.layers.hydra import Hydra, hydra_config
from medmamba.layers.mamba import Mamba, MambaConfig, backward, sliced
from medmamba.layers.mamba2 import Mamba2, Mamba2Config
from medmamba.layers.s4d import S4D, S4DConfig

SMALL = MambaConfig(d_model=8, d_state=4)
SMALL2 = Mamba2Config(d_model=8, d_state=4, head_width=4, groups=2, chunk=4)
SMALL_HYDRA = hydra_config(8, d_state=4, head_width=4)


def reach(module: nn.Module, tokens: Tensor, position: int) -> Tensor:
    """How strongly the output at `position` depends on each token, (L,)."""
    tokens = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(tokens)[:, position].square().sum(), tokens)
    return gradient.abs().sum((0, 2))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mixer", [Mamba(SMALL), Mamba2(SMALL2), S4D(S4DConfig(d_model=8, channels_first=False))])
def test_causal_mixers_read_the_past_only(mixer: nn.Module, tokens: Tensor) -> None:
    seen = reach(mixer.double(), tokens, 6)
    assert (seen[:7] > 0).all()
    assert (seen[7:] < 1e-12).all()  # the FFT of S4D leaves rounding, the others exact zeros


@pytest.mark.parametrize("mixer", [Mamba(SMALL, {"": None, "_b": backward}), Hydra(SMALL_HYDRA)])
def test_two_sided_mixers_read_everything(mixer: nn.Module, tokens: Tensor) -> None:
    assert (reach(mixer.double(), tokens, 6) > 0).all()


def test_backward_with_the_same_parameters_mirrors_forward(tokens: Tensor) -> None:
    mixer = Mamba(SMALL, {"": None, "_b": backward}).double()
    own = dict(mixer.named_parameters())
    for name in ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight", "dt_proj{}.bias", "D{}"):
        own[name.format("_b")].data.copy_(own[name.format("")].data)
    torch.testing.assert_close(mixer(tokens.flip(1)), mixer(tokens).flip(1))


def test_slices_bring_equal_positions_together() -> None:
    assert sliced(3)(12).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    with pytest.raises(ShapeError, match="10 tokens"):
        sliced(4)(10)


def test_average_and_layer_scale(tokens: Tensor) -> None:
    torch.manual_seed(0)
    plain = Mamba(SMALL, {"": None, "_b": backward}).double()
    config = replace(SMALL, average=True, layer_scale=0.5)
    scaled = Mamba(config, {"": None, "_b": backward}).double()
    scaled.load_state_dict({**plain.state_dict(), "gamma": scaled.gamma})
    torch.testing.assert_close(scaled(tokens), plain(tokens) / 4)


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_length_need_not_fit_the_chunk(length: int, tokens: Tensor) -> None:
    for mixer, config in ((Mamba2, SMALL2), (Hydra, SMALL_HYDRA)):
        torch.manual_seed(1)
        one = mixer(config).double()
        other = mixer(replace(config, chunk=64)).double()
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(one(tokens[:, :length]), other(tokens[:, :length]))


def test_start_state_and_step_limit_count(tokens: Tensor) -> None:
    for mixer, config in ((Mamba2, SMALL2), (Hydra, SMALL_HYDRA)):
        torch.manual_seed(1)
        plain = mixer(config).double()
        started = mixer(replace(config, learnable_start=True)).double()
        started.load_state_dict({**plain.state_dict(), "init_states": started.init_states})
        torch.testing.assert_close(started(tokens), plain(tokens))
        started.init_states.data.add_(1)
        assert not torch.allclose(started(tokens), plain(tokens))
        limited = mixer(replace(config, step_limit=(0.5, 0.6))).double()
        limited.load_state_dict(plain.state_dict())
        assert not torch.allclose(limited(tokens), plain(tokens))
        assert plain.config.steps(torch.tensor([-9.0, 9.0])).max() > 8
        assert limited.config.steps(torch.tensor([-9.0, 9.0])).tolist() == pytest.approx([0.5, 0.6])


def test_s4d_layouts_agree(tokens: Tensor) -> None:
    last = S4D(S4DConfig(d_model=8, channels_first=False)).double()
    first = S4D(S4DConfig(d_model=8)).double()
    first.load_state_dict(last.state_dict())
    torch.testing.assert_close(first(tokens.transpose(1, 2)).transpose(1, 2), last(tokens))


def test_gated_attention_options_count() -> None:
    patches = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0))
    config = GatedLinearAttentionConfig(d_model=8, heads=2, gate_rank=4)
    torch.manual_seed(0)
    plain = GatedLinearAttention(config)
    for change in ({"gate_floor": -0.01}, {"out_activation": True}, {"local_activation": False}, {"gate_divisor": 2}):
        other = GatedLinearAttention(replace(config, **change))
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other(patches, (3, 4)), plain(patches, (3, 4))), change


@pytest.mark.parametrize("mixer", [Mamba(SMALL), Mamba2(SMALL2), Hydra(SMALL_HYDRA), S4D(S4DConfig(d_model=8))])
def test_mixed_precision_and_gradients(mixer: nn.Module, tokens: Tensor) -> None:
    given = tokens.float().transpose(1, 2) if isinstance(mixer, S4D) else tokens.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer(given)
    got.float().square().sum().backward()
    want = mixer(given)
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()  # bfloat16 keeps 8 bits
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_wrong_sizes_are_told() -> None:
    wide = torch.zeros(1, 4, 9)
    for mixer in (Mamba(SMALL), Mamba2(SMALL2), Hydra(SMALL_HYDRA), S4D(S4DConfig(d_model=8))):
        with pytest.raises(ShapeError, match="8"):
            mixer(wide)
    with pytest.raises(ShapeError, match="12"):
        GatedLinearAttention(GatedLinearAttentionConfig(d_model=8, heads=2))(torch.zeros(1, 11, 8), (3, 4))
    for make in (
        lambda: Mamba2Config(d_model=8, head_width=5),
        lambda: Hydra(replace(SMALL_HYDRA, d_conv=4)),
        lambda: S4D(S4DConfig(d_model=8, d_state=3)),
        lambda: GatedLinearAttentionConfig(d_model=8, heads=2, expand_value=2.0),
        lambda: Mamba(replace(SMALL, d_state=0)),
    ):
        with pytest.raises(ConfigError):
            make()
