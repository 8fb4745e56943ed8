"""The Mamba U-Net: any size in, the same size out; the three memory modes are one network; every parameter learns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.mixers import MIXERS, VSSD, Mixer
from medmamba.nets import network_class
from medmamba.nets.mamba_unet import BRANCHES, MambaUNet
from medmamba.ops.gla import gla_bidirectional_sequential
from medmamba.ops.scan_directions import direction_order, scan_directions_sequential
from medmamba.ops.ssd import quasiseparable_sequential, ssd_noncausal_sequential, ssd_sequential
from medmamba.routes import STREAMABLE, route

SMALL: dict[str, Any] = {"spatial_dims": 2, "widths": (4, 8), "depths": (1, 1), "state": 2, "mixer_from": 0}


def small(memory: str | None = None, **settings: Any) -> MambaUNet:
    torch.manual_seed(0)
    return MambaUNet(MambaUNet.Config(**{**SMALL, **settings}), memory=memory)


def step(network: MambaUNet, shape: tuple[int, ...], *, last: bool = False) -> list[Tensor]:
    """Scores, loss and all gradients of one training step; `last`: the image in channels-last memory."""
    torch.manual_seed(1)
    image = torch.randn(shape)
    if last:
        image = image.contiguous(memory_format=torch.channels_last if image.ndim == 4 else torch.channels_last_3d)
    image.requires_grad_()
    network.zero_grad()
    scores = network(image)
    loss = torch.nn.functional.cross_entropy(scores, torch.randint(0, scores.shape[1], (shape[0], *shape[2:])))
    loss.backward()
    grads = [image.grad, *(p.grad for p in network.parameters())]
    assert all(g is not None for g in grads)
    return [scores.detach(), loss.detach(), *grads]  # type: ignore[list-item]


def equal(found: list[Tensor], truth: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, truth, strict=True))


VOLUME: dict[str, Any] = {"spatial_dims": 3, "widths": (8, 16, 32), "depths": (1, 2, 1)}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    **{f"{m} plane": ({"mixer": m}, (1, 1, 6, 8)) for m in (*MIXERS, "none")},
    **{f"{m} volume": ({**VOLUME, "mixer": m}, (1, 1, 4, 8, 4)) for m in (*MIXERS, "none")},
    **{f"{b} plane": ({"branch": b, "mixer": "vssd"}, (2, 1, 6, 8)) for b in BRANCHES},
    **{f"{b} volume": ({**VOLUME, "branch": b}, (1, 1, 4, 8, 4)) for b in BRANCHES},
    "split plane": ({"down": "split"}, (1, 1, 6, 8)),
    "split volume": ({**VOLUME, "down": "split"}, (2, 1, 4, 8, 4)),
    "flat strides": ({**VOLUME, "strides": ((1, 2, 2), (2, 2, 1))}, (1, 1, 4, 8, 4)),
    "stride 3": ({"strides": ((3, 1),)}, (1, 1, 6, 8)),
    "odd size": ({**VOLUME, "in_channels": 2}, (1, 2, 5, 7, 3)),
    "deep": ({"depths": (6, 6), "mixer": "none"}, (1, 1, 6, 8)),
    "other routes": ({"routes": ("hilbert", "snake", "column")}, (1, 1, 6, 8)),
    "coarse grid": ({"grid_bits": 5}, (1, 1, 6, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_all_modes_are_equal_bit_for_bit(name: str) -> None:
    settings, shape = CASES[name]
    network = small("stored", **settings)
    truth = step(network, shape)
    for memory in ("stages", "full"):
        network.memory = memory
        assert equal(step(network, shape), truth), memory


def test_batch_and_memory_layout_of_the_image_change_no_bit_between_modes() -> None:
    for batch, last in itertools.product((1, 3), (False, True)):
        network = small("stored", **VOLUME, in_channels=2)
        truth = step(network, (batch, 2, 4, 4, 4), last=last)
        network.memory = "full"
        assert equal(step(network, (batch, 2, 4, 4, 4), last=not last), truth)


def test_plain_couplings_agree_to_rounding() -> None:
    network = small("stored", **VOLUME, coupling="plain")
    truth = step(network, (1, 1, 8, 8, 4))
    network.memory = "full"
    for x, y in zip(step(network, (1, 1, 8, 8, 4)), truth, strict=True):
        assert float((x - y).norm()) <= 1e-4 * float(y.norm()) + 1e-7


def test_the_twin_with_strided_convolutions_has_two_modes() -> None:
    network = small(**VOLUME, down="strided")
    assert network.memory == "stages"
    staged = step(network, (1, 1, 5, 6, 4))
    network.memory = "stored"
    assert equal(step(network, (1, 1, 5, 6, 4)), staged)
    network.memory = "full"
    with pytest.raises(ConfigError, match="stages"):
        network(torch.zeros(1, 1, 4, 4, 4))


def test_the_body_goes_back_to_the_stem() -> None:
    network = small(**VOLUME, mixer="s6", down="haar").eval()
    snap = network.grid()
    with torch.no_grad():
        start = network.stem(torch.randn(1, 1, 8, 8, 4), snap)
        state = start
        for each in network.body.steps:
            state = each(state, snap)
        assert len(state) == 2  # every skip stream was used up
        for each in reversed(network.body.steps):
            state = each.inverse(state, snap)  # type: ignore[operator]
    assert equal(list(state), list(start))


@pytest.mark.parametrize("space", [(8, 8), (7, 5), (1, 3), (9, 8, 4), (3, 5, 1)])
@pytest.mark.parametrize("mixer", ["s6", "none"])
def test_any_size_gives_the_same_size(space: tuple[int, ...], mixer: str) -> None:
    network = small(spatial_dims=len(space), in_channels=2, out_channels=3, mixer=mixer)
    assert network(torch.randn(2, 2, *space)).shape == (2, 3, *space)


def test_it_is_in_the_table() -> None:
    assert network_class("mamba_unet") is MambaUNet


@pytest.mark.parametrize("settings", [{}, {"mixer": "hydra", "branch": "inverted"}, {"down": "strided"}])
def test_every_parameter_gets_a_gradient_and_batched_equals_single(settings: dict[str, Any]) -> None:
    network = small(**VOLUME, strides=((1, 2, 2), (2, 2, 1)), **settings).eval()
    x = torch.randn(2, 1, 5, 6, 7)
    y = network(x)
    (y * torch.randn(y.shape)).mean().backward()
    assert [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    single = torch.cat([network(x[:1]), network(x[1:])])
    torch.testing.assert_close(y, single, rtol=1e-3, atol=1e-3)  # one bit in a sum may become a step of the grid, 6e-5


def test_the_mixer_sees_the_whole_image_and_none_does_not() -> None:
    """A far corner changes when the near one does; two couplings of 3 x 3 and the stem reach 3 cells."""
    for mixer, reached in (*((m, True) for m in MIXERS), ("none", False)):
        network = small(widths=(4,), depths=(1,), mixer=mixer, coupling="plain").double()
        x = torch.randn(1, 1, 12, 12, dtype=torch.float64)
        moved = x.clone()
        moved[..., 0, 0] += 1
        assert bool((network(x) - network(moved))[..., -1, -1].abs().max() > 0) is reached, mixer


def mixer(name: str, *, route: str = "raster", width: int = 8, state: int = 3) -> Mixer:
    torch.manual_seed(3)
    return MIXERS[name](width, state=state, route=route).double()


def definition(name: str, layer: Any, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D) in visiting order through the slow definition of the mixer's op."""
    heads = tokens.unflatten(-1, (layer.heads, layer.head))
    if name == "vssd":
        weight, B, C = layer.projected(tokens)
        return ssd_noncausal_sequential(heads, weight, B[:, :, None], C[:, :, None]).flatten(2) / tokens.shape[1]
    if name == "gla":
        parts = layer.project(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2).chunk(4, -1)
        gates = [torch.nn.functional.logsigmoid(g) / 16 for g in parts[2:]]
        q = parts[0] * layer.state**-0.5
        y = gla_bidirectional_sequential(q, parts[1], heads.transpose(1, 2), *gates)
        return y.transpose(1, 2).flatten(2)
    if name == "hydra":
        sizes = [layer.heads] * 3 + [layer.state] * 4
        diagonal, raw, raw_back, *rest = layer.project(tokens).split(sizes, -1)
        ways = zip((raw, raw_back), layer.step_bias, strict=True)
        dt = tuple(torch.nn.functional.softplus(x + bias) for x, bias in ways)
        B, B_back, C, C_back = (x[:, :, None] for x in rest)
        A = -layer.A_log.exp()
        return quasiseparable_sequential(heads, dt, A, (B, B_back), (C, C_back), diagonal).flatten(2)
    total = torch.zeros_like(tokens)
    for way, projected in enumerate(layer.project(tokens).chunk(2, -1)):
        low, B, C = (x.flip(1) if way else x for x in projected.split([layer.rank, layer.state, layer.state], dim=-1))
        x = heads.flip(1) if way else heads
        if name == "ssd":
            dt_way = torch.nn.functional.softplus(low + layer.step_bias[way])
            y = ssd_sequential(x, dt_way, -layer.A_log[way].exp(), B[:, :, None], C[:, :, None])[0].flatten(2)
        else:
            raw_steps = low @ layer.step[way].T
            y = scan_directions_sequential(
                x.flatten(2), raw_steps[:, None], -layer.A_log[way : way + 1].exp(), B[:, None], C[:, None],
                delta_bias=layer.step_bias[way : way + 1], delta_softplus=True, directions=((0, 1),))[0]  # fmt: skip
        total = total + (y.flip(1) if way else y)
    return total


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("path", ["raster", "plane_columns", "hilbert"])
def test_a_mixer_is_the_definition_along_its_route(name: str, path: str) -> None:
    layer, x = mixer(name, route=path, width=32), torch.randn(2, 3, 2, 4, 32, dtype=torch.float64)
    order = route(path, x.shape[1:-1])
    tokens = x.flatten(1, -2)[:, order]
    expected = torch.zeros_like(tokens).index_copy(1, order, definition(name, layer, tokens)).view(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_the_global_state_is_summed_plane_after_plane_in_one_order() -> None:
    """The trap of order: a sum over slabs in another order differs by 1e-7, and the grid makes steps of it.

    Planes of 32 positions: torch computes the last, incomplete vector of a tensor by other instructions.
    """
    torch.manual_seed(3)
    layer = VSSD(8, state=3, route="raster")
    x = torch.randn(1, 9, 4, 8, 8)
    whole = layer(x)
    for slab in (1, 2, 4):
        total: Tensor | None = None
        pieces = [x[:, i : i + slab] for i in range(0, 9, slab)]
        for piece in reversed(pieces):  # a stream gathers while it sweeps back
            weight, B, _ = layer.projected(piece)
            for plane in reversed(layer.plane_states(piece, weight, B).unbind(1)):
                total = plane if total is None else total + plane
        assert total is not None
        parts = [layer.read(layer.projected(p)[2], total / (9 * 4 * 8)).view(p.shape) for p in pieces]
        assert torch.equal(torch.cat(parts, 1), whole)
    weight, B, C = layer.projected(x)
    at_once = layer.plane_states(x.flatten(1, 2)[:, None], weight.flatten(1, 2)[:, None], B.flatten(1, 2)[:, None])
    assert not torch.equal(layer.read(C, at_once[:, 0] / (9 * 4 * 8)).view(x.shape), whole)  # the order matters


def test_streamable_routes_have_the_first_axis_slowest() -> None:
    for name, shape in itertools.product(STREAMABLE, ((4, 3, 5), (4, 5))):
        plane = route(name, shape) // torch.tensor(shape[1:]).prod()
        assert bool((plane.diff() >= 0).all())
    assert MambaUNet.Config().streamable
    assert not MambaUNet.Config(routes=("raster", "column")).streamable
    assert torch.equal(route("plane_columns", (2, 2, 3)), torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]))
    assert torch.equal(route("plane_columns", (2, 3)), direction_order((2, 3), (-1, 1)).long())


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_stay_float32_under_autocast(name: str) -> None:
    layer, x = mixer(name).float(), torch.randn(1, 3, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))  # bit for bit what it is without autocast


def test_streams_stay_float32_under_autocast_in_every_mode() -> None:
    runs = []
    for memory in ("stored", "full"):
        network = small(memory, **VOLUME)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(torch.ones(1, 1, 4, 4, 4)).float().square().mean()
        loss.backward()
        runs.append([loss.detach(), *(p.grad for p in network.parameters())])
    assert equal(runs[1], runs[0])  # type: ignore[arg-type]
    assert all(g.dtype == torch.float32 for g in runs[0] if g is not None)


def test_training_makes_the_grid_coarser_when_values_grow() -> None:
    network = small("full")
    with torch.no_grad():
        network.stem.conv.bias.fill_(700.0)
    for bits in (14, 13):
        network(torch.zeros(1, 1, 4, 4)).sum().backward()
        assert network.grid.step == 2.0**-bits
        assert network.grid.exact
    assert "grid.step" in network.state_dict()


def test_save_and_load_gives_the_same_function() -> None:
    a, b = small(), MambaUNet(MambaUNet.Config(**SMALL))
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 1, 9, 9)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"spatial_dims": 4}, {"mixer": "s7"}, {"widths": (4,)}, {"strides": ((2, 2),) * 2}, {"state": 0},
        {"out_channels": 0}, {"widths": (4, 6)}, {"widths": (3, 6)}, {"routes": ()}, {"routes": ("zigzag",)},
        {"down": "pool"}, {"branch": "fat"}, {"coupling": "loose"}, {"grid_bits": 40}, {"strides": ((1, 1),)},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small(**wrong)


def test_wrong_input_is_refused_with_its_shape() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 2, 8, 8\)"):
        small()(torch.zeros(1, 2, 8, 8))
