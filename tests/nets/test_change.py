"""Change networks beyond their golden cases: published sizes, any shape, gradients, batches, what a date is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.change_pair import alternate_columns, classes_of, part_columns, split_dates, split_scores
from medmamba.nets import network_class, own_name
from medmamba.nets.atrousmamba import AtrousWindowScan, AWMambaBCDConfig, atrous_orders
from medmamba.nets.changemamba import MambaBCD, MambaBCDConfig, MambaSCD, MambaSCDConfig
from medmamba.nets.mambafcs import MambaFCS, MambaFCSConfig
from medmamba.routes import inverse

SMALL_ENCODER = {"depths": (2, 2, 15, 2)}
BASE_ENCODER = SMALL_ENCODER | {"widths": (128, 256, 512, 1024)}
# Measured on the official code; Mamba-FCS holds 5,578,240 values in a cross attention that is never used.
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bcd tiny": (lambda: MambaBCD(MambaBCDConfig()), 32613506),
    "scd small": (lambda: MambaSCD(MambaSCDConfig(**SMALL_ENCODER)), 58511753),
    "scd base": (lambda: MambaSCD(MambaSCDConfig(**BASE_ENCODER)), 97034889),
    "fcs base": (lambda: MambaFCS(MambaFCSConfig()), 206148071 - 5578240),
}

TINY = {"in_channels": 4, "depths": (1, 1, 1, 1), "widths": (8, 8, 12, 16), "mlp_ratio": 1.0, "drop_path": 0.0}
WIDE = TINY | {"widths": (16, 16, 16, 24)}
SETTINGS = {
    "mambabcd": TINY | {"width": 8},
    "mambascd": TINY | {"width": 8, "out_channels": 2 + 2 * 3},
    "mambafcs": WIDE | {"out_channels": 2 + 2 * 3},
    "awmambabcd": TINY | {"width": 8, "rates": (1, 2, 3), "side": 2},
    "awmambascd": TINY | {"width": 8, "out_channels": 2 + 2 * 3, "rates": (2, 3), "side": 2},
}


def tiny(name: str) -> tuple[nn.Module, Tensor]:
    """A small network in evaluation mode with every parameter away from zero, and two pairs for it."""
    torch.manual_seed(0)
    kind = network_class(name)
    network = kind(kind.Config(**SETTINGS[name])).double().eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            awake = 1.0 if key.endswith("excitation.0.bias") else 0.0  # a squeeze of one unit may be off everywhere
            parameter.add_(awake + 0.05 * torch.randn_like(parameter))
    return network, torch.randn(2, 4, 37, 45, dtype=torch.float64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    make, size = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == size


@pytest.mark.parametrize("name", SETTINGS)
def test_shape_and_gradients_reach_every_parameter(name: str) -> None:
    network, pair = tiny(name)
    scores = network(pair)
    assert scores.shape == (2, network.config.out_channels, 37, 45)  # type: ignore[union-attr]
    (scores * torch.randn_like(scores)).sum().backward()
    silent = [key for key, p in network.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("name", SETTINGS)
def test_batched_equals_single_and_dates_count(name: str) -> None:
    network, pair = tiny(name)
    with torch.no_grad():
        both, one, turned = network(pair), network(pair[1:]), network(pair.roll(2, dims=1))
    torch.testing.assert_close(both[1:], one)
    assert (both - turned).abs().max() > 1e-3  # the earlier date is not the later
    with pytest.raises(ShapeError, match="the earlier date first"):
        network(pair[:, :3])


@pytest.mark.parametrize("name", ["mambascd", "mambafcs", "awmambascd"])
def test_semantic_scores_fall_into_change_and_two_dates(name: str) -> None:
    network, pair = tiny(name)
    with torch.no_grad():
        scores = network(pair)
        elsewhere = pair.clone()
        elsewhere[:, 2:] += 1.0
        moved = network(elsewhere)
    parts, others = split_scores(scores), split_scores(moved)
    assert [part.shape[1] for part in parts] == [2, 3, 3]
    guided = name == "mambafcs"  # there alone the change map weighs the earlier date's features
    assert torch.equal(parts[1], others[1]) != guided
    assert not torch.equal(parts[2], others[2])


def test_drop_path_works_in_training_only() -> None:
    network, pair = tiny("mambabcd")
    dropped = MambaBCD(replace(network.config, drop_path=0.9)).double().eval()  # type: ignore[type-var]
    dropped.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(dropped(pair), network(pair))
        network.train(), dropped.train()
        assert not torch.equal(dropped(pair), network(pair))


def test_published_cross_attention_is_left_out() -> None:
    assert own_name(MambaFCS, "decoder_bcd.fuse_layer_1.cross_attn.qkv.weight") is None
    assert own_name(MambaFCS, "decoder_bcd.fuse_layer_1.reduce_conv.weight") is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MambaBCDConfig(in_channels=3), "two dates"),
        (lambda: MambaBCDConfig(depths=(1, 1)), "one of each"),
        (lambda: MambaFCSConfig(widths=(8, 16, 16, 16)), "16 or more"),
        (lambda: MambaSCD(MambaSCDConfig(out_channels=7)), "2 \\+ 2K"),
        (lambda: AWMambaBCDConfig(rates=(2, 0)), "1 or more"),
        (lambda: AWMambaBCDConfig(gate=True), "no gate"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_pairs_and_woven_columns() -> None:
    pair = torch.arange(2 * 6 * 2 * 3.0).reshape(2, 6, 2, 3)
    earlier, later = split_dates(pair, 6)
    assert torch.equal(torch.cat([earlier, later], dim=1), pair)
    woven = alternate_columns(earlier, later)
    assert torch.equal(woven[..., 2], earlier[..., 1])
    assert all(map(torch.equal, part_columns(woven), (earlier, later)))
    assert classes_of(16) == 7


RATES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shape=st.tuples(st.integers(1, 23), st.integers(1, 23)), rates=RATES, side=st.integers(1, 5))
def test_each_rate_visits_every_position_once(shape: tuple[int, int], rates: tuple[int, ...], side: int) -> None:
    orders = atrous_orders(shape, rates, side)
    positions = torch.arange(shape[0] * shape[1], dtype=torch.int32)
    assert orders.shape == (len(rates), len(positions))
    assert torch.equal(orders.sort(dim=1).values, positions.expand_as(orders))


@given(windows=st.tuples(st.integers(1, 3), st.integers(1, 3)), rates=RATES, side=st.integers(2, 5))
def test_tokens_a_rate_apart_follow_each_other(windows: tuple[int, int], rates: tuple[int, ...], side: int) -> None:
    """Inside a window tokens `rate` px apart are 1 step apart along a row (raster: rate) and `side` steps down."""
    for number, rate in enumerate(rates):
        reach = side * rate
        height, width = windows[0] * reach, windows[1] * reach
        steps = inverse(atrous_orders((height, width), rates, side)[number].long()).reshape(height, width)
        way = -1 if number % 2 else 1  # every second rate is read backwards
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        along = (x % reach < reach - rate)[:, :-rate]
        down = (y % reach < reach - rate)[:-rate]
        assert ((steps[:, rate:] - steps[:, :-rate])[along] == way).all()
        assert ((steps[rate:] - steps[:-rate])[down] == way * side).all()  # raster: rate * width


def test_atrous_scan_feels_what_its_orders_put_before() -> None:
    torch.manual_seed(0)
    settings = {"state": 2, "ratio": 1.0, "dt_rank": None, "conv": 1, "conv_bias": False}
    scan = AtrousWindowScan(4, rates=(3, 2), side=2, **settings).double()  # type: ignore[arg-type]
    scan.se = nn.Identity()  # it mixes all positions
    image = torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    scan(image)[0, :, 4, 4].sum().backward()
    assert image.grad is not None
    felt = image.grad[0].abs().sum(dim=0).flatten().nonzero().flatten().tolist()
    before: set[int] = set()
    for order in atrous_orders((9, 9), (3, 2), 2).tolist():
        before |= set(order[: order.index(4 * 9 + 4) + 1])
    assert set(felt) == before
    assert len(before) < 81
