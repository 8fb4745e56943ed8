"""Bodies that are computed back: exact inverses, gradients of the stored run bit for bit, and every trap on its own."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError
from medmamba.layers.grid import Grid, Snap, dense
from medmamba.layers.haar import DOWN, HaarDown, SplitDown, lift
from medmamba.layers.reversible import MODES, Reversible, Undone, coupling
from medmamba.layers.strided import StridedDown, StridedUp
from tests.layers import ddp_driver

C = 4  # channels of a half


class Branch(nn.Module):
    """(B, *space, C) -> the same, with biases, whose gradients are sums over all positions."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.norm, self.first, self.inside, self.second = (
            nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Sequential(*inside), nn.Linear(2 * C, C))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inside(torch.tanh(self.first(self.norm(x)))))


class LastBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Sum(nn.Module):
    """A head: both halves added, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, 3)

    def forward(self, state: tuple[Tensor, ...]) -> Tensor:
        return self.linear(state[0] + state[1])


def body(*inside: Callable[[], nn.Module], depth: int = 2, head: bool = True) -> Reversible:
    torch.manual_seed(0)
    pairs = [coupling(Branch(*[f() for f in inside]), Branch(*[f() for f in inside])) for _ in range(depth)]
    return Reversible([step for pair in pairs for step in pair], Sum() if head else None)


def halves(batch: int = 1, space: tuple[int, ...] = (3, 5), seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two leaves on the grid."""
    torch.manual_seed(seed)
    a, b = (on_grid(torch.randn(batch, *space, C)).requires_grad_() for _ in range(2))
    return a, b


def on_grid(x: Tensor, bits: int = 14) -> Tensor:
    return (x * 2**bits).round() / 2**bits


def learn(net: Reversible, memory: str, *, batch: int = 1, snap: Snap | None = None, seed: int = 7) -> list[Tensor]:
    """Output, gradients of inputs and of all parameters, from an uneven loss."""
    net, state = copy.deepcopy(net), halves(batch)
    torch.manual_seed(seed)
    out = net(state, snap or Grid()(), memory)
    out = out if isinstance(out, Tensor) else torch.cat(out, -1)
    weights = torch.linspace(-1, 1, out[0].numel()).view(out.shape[-1], *out.shape[1:-1]).movedim(0, -1)  # strided
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in state), *(p.grad for p in net.parameters()), *net.buffers()]


def same(found: list[Tensor], truth: list[Tensor]) -> bool:
    return len(found) == len(truth) and all(torch.equal(x, y) for x, y in zip(found, truth))


@pytest.mark.parametrize("memory", ["stages", "full"])
@pytest.mark.parametrize("batch", [1, 3])  # with batch 1 alone a strided gradient once changed the sums of the biases
@pytest.mark.parametrize("head", [True, False])
def test_gradients_are_those_of_the_stored_run_bit_for_bit(memory: str, batch: int, head: bool) -> None:
    net = body(head=head)
    assert same(learn(net, memory, batch=batch), learn(net, "stored", batch=batch))


def test_without_the_grid_gradients_agree_to_rounding() -> None:
    net, plain = body(depth=4), Snap(None, None)
    found, truth = learn(net, "full", snap=plain), learn(net, "stored", snap=plain)
    assert not same(found, truth)  # or the grid would be of no use
    for x, y in zip(found, truth):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_strided_gradient_is_made_dense() -> None:
    """The trap of batch 1: the view counts as contiguous, its strides are others, and sums run in another order."""
    x = torch.randn(1, 3, 5, C, requires_grad=True)
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    wide = torch.randn(1, 3, 5, 2 * C)
    for grad in (wide[..., :C], torch.randn(C, 3, 5)[None].movedim(1, -1), torch.randn(3, 5, C).as_strided(
            (1, 3, 5, C), (1, 5 * C, C, 1))):  # fmt: skip
        Grid()()(x).backward(grad)
        assert seen[-1].stride() == (60, 20, 4, 1)
        assert torch.equal(seen[-1], grad)


def test_the_layout_of_what_comes_in_does_not_matter() -> None:
    """Streams are dense channels-last maps; ways down and up keep them so, whatever they slice and join."""
    a, b = (x.detach() for x in halves(1, (4, 6)))
    snap = Grid()()
    for down in (HaarDown((2, 2)), HaarDown((1, 3)), SplitDown((2, 2)), SplitDown((2, 1))):
        state = down((a, b), snap)
        back = Undone(down)(state, snap)
        for stream in (*state, *back):
            assert stream.numel() == 0 or stream.stride() == torch.empty(stream.shape).stride()
    turned = dense(torch.randn(1, C, 4, 6).movedim(1, -1))
    assert turned.stride() == a.stride()


STRIDES = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple).filter(lambda s: max(s) > 1)


@settings(max_examples=60)
@given(strides=STRIDES, cells=st.integers(1, 2), batch=st.integers(1, 2), seed=st.integers(0, 9),
       kind=st.sampled_from(sorted(DOWN)))  # fmt: skip
def test_ways_down_are_undone_exactly(strides: tuple[int, ...], cells: int, batch: int, seed: int, kind: str) -> None:
    channels = C * math.prod(strides)  # what a split wants
    torch.manual_seed(seed)
    a, b = (on_grid(30 * torch.randn(batch, *(s * cells for s in strides), channels)) for _ in range(2))
    snap, down = Grid()(), DOWN[kind](strides)
    state = down((a, b, a), snap)  # a third stream lies below and stays
    assert [s.shape[-1] for s in state[:2]] == [2 * channels] * 2
    assert sum(s.numel() for s in state[:-1]) == a.numel() + b.numel()
    assert same(list(down.inverse(state, snap)), [a, b, a])
    assert same(list(down(down.inverse(state, snap), snap)), list(state))


@settings(max_examples=30)
@given(space=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), depth=st.integers(1, 3),
       scale=st.sampled_from([0.01, 1.0, 300.0]))  # fmt: skip
def test_couplings_are_undone_exactly(space: tuple[int, ...], depth: int, scale: float) -> None:
    net, snap = body(depth=depth), Grid()()
    torch.manual_seed(2)
    start = tuple(on_grid(torch.randn(2, *space, C) * scale) for _ in range(2))
    with torch.no_grad():
        state = start
        for step in net.steps:
            state = step(state, snap)
        for step in reversed(net.steps):
            state = step.inverse(state, snap)
    assert same(list(state), list(start))


def test_the_mean_band_is_the_mean() -> None:
    x = on_grid(torch.randn(1, 6, 2))
    mean, *details = lift(x, 1, 3, Grid()())
    torch.testing.assert_close(mean, x.view(1, 2, 3, 2).mean(2), rtol=0, atol=2.0**-14)  # one step of the grid
    assert torch.equal(details[1], x[:, 2::3] - x[:, ::3])


def test_a_map_that_does_not_fit_the_strides_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 5\).*\(2, 2\)"):
        HaarDown((2, 2))(halves(), Grid()())


@pytest.mark.parametrize("memory", ["stages", "full"])
def test_random_layers_draw_the_same_numbers_again(memory: str) -> None:
    net = body(lambda: nn.Dropout(0.5)).train()
    truth = learn(net, "stored")
    after = torch.rand(3)
    assert same(learn(net, memory), truth)
    assert torch.equal(torch.rand(3), after)  # recomputation leaves the generator where the forward pass left it
    assert not same(learn(net, "stored", seed=8), truth)  # the dropout does something


@pytest.mark.parametrize("memory", ["stages", "full"])
def test_running_statistics_are_counted_once(memory: str) -> None:
    net = body(lambda: LastBatchNorm(2 * C)).train()
    found, truth = learn(net, memory, batch=2), learn(net, "stored", batch=2)
    assert same(found, truth)  # buffers are among them
    assert [int(x) for x in found if x.dtype == torch.long] == [1] * 4


@pytest.mark.parametrize("memory", ["stages", "full"])
def test_autocast_is_entered_again_and_streams_stay_float32(memory: str) -> None:
    def run(memory: str) -> list[Tensor]:
        net, state = body(), halves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(state, Grid()(), memory)
            assert isinstance(out, Tensor)
        out.float().sum().backward()
        return [out.detach(), *(x.grad for x in state), *(p.grad for p in net.parameters())]

    found, truth = run(memory), run("stored")
    assert same(found, truth)
    assert truth[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert body(head=False)(halves(), Grid()(), memory)[0].dtype == torch.float32
    assert not same(truth, learn(body(), "stored"))  # autocast does something


def test_autograd_grad_and_a_kept_graph() -> None:
    net, state = body(), halves()
    out = net(state, Grid()(), "full")
    first = torch.autograd.grad(out.sum(), [*state, *net.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [*state, *net.parameters()])
    assert same(list(first), list(second))
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="freed"):
        out.sum().backward()


def test_only_what_wants_a_gradient_gets_one() -> None:
    net = body()
    net.steps[0].requires_grad_(False)
    a, b = (x.detach() for x in halves())
    net((a, b), Grid()(), "full").sum().backward()
    assert all(p.grad is None for p in net.steps[0].parameters())
    assert all(p.grad is not None for p in net.steps[1].parameters())
    assert not net.requires_grad_(False)((a, b), Grid()(), "full").requires_grad


def test_one_branch_used_in_several_places() -> None:
    torch.manual_seed(0)
    shared = Branch()
    net = Reversible(coupling(shared, shared) * 2)
    assert same(learn(net, "full"), learn(net, "stored"))


def test_one_body_used_twice() -> None:
    def run(memory: str) -> list[Tensor]:
        net, state, snap = body(head=False), halves(), Grid()()
        a, b = net(net(state, snap, memory), snap, memory)
        (a.sin() + b).sum().backward()
        return [a.detach(), *(x.grad for x in state), *(p.grad for p in net.parameters())]

    assert same(run("full"), run("stored"))


def test_a_weight_changed_before_backward_is_told() -> None:
    net = body()
    out = net(halves(), Grid()(), "full").sum()
    with torch.no_grad():
        net.steps[0].branch.first.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_second_derivatives_are_refused_and_stored_has_them() -> None:
    def penalty(memory: str) -> Tensor:
        state = halves()
        out = body()(state, Grid()(), memory)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out.sum(), state[0], create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match="no second derivatives"):
        penalty("full")
    assert penalty("stored").requires_grad


def test_modes_and_what_cannot_be_undone() -> None:
    net = Reversible([*body().steps, StridedDown(2 * C, 12, (2, 2)), StridedUp(12, 2 * C, (2, 2))])
    state = halves(1, (4, 4))
    for memory in ("stored", "stages"):
        assert net(state, Grid()(), memory)[0].shape == state[0].shape
    with pytest.raises(ConfigError, match=r"StridedDown, StridedUp.*stages"):
        net(state, Grid()(), "full")
    with pytest.raises(ConfigError, match=", ".join(MODES)):
        net(state, Grid()(), "none")


def test_the_grid_grows_coarser_before_values_leave_its_range() -> None:
    """At 14 bits the range is 2**10; a pass that reaches 600 makes the next one coarser by one bit, once."""
    grid = Grid(14).train()
    for value, bits, exact in ((500.0, 14, True), (600.0, 14, True), (600.0, 13, True), (600.0, 13, True),
                               (3000.0, 13, False), (1.0, 12, True), (1.0, 12, True)):  # fmt: skip
        snap = grid()
        assert grid.step == 2.0**-bits == snap.step
        snap.watched((torch.tensor([[-value]]),), ())
        assert grid.exact is exact
    before = grid.step.clone()
    grid.eval()().watched((torch.tensor([[1e9]]),), ())
    grid.eval()()
    assert grid.step == before  # only training moves it


def test_a_pass_is_undone_on_the_grid_it_was_run_on() -> None:
    """Two forward passes before one backward: the second has moved the grid."""
    net, grid = body(), Grid(18).train()

    def run(memory: str) -> list[Tensor]:
        grid.step.fill_(2.0**-18)
        state = halves()
        out = net(tuple(40 * x for x in state), grid(), memory)  # beyond 2**5, half the range
        grid.peak.fill_(40)
        assert grid().step == 2.0**-17
        return [*torch.autograd.grad(out.sum(), [*state, *net.parameters()])]

    assert same(run("full"), run("stored"))


def test_beyond_the_range_gradients_degrade_softly() -> None:
    net, snap = body(), Grid(14)()
    big = tuple(3000 * x.detach() for x in halves())
    grads = []
    for memory in ("full", "stored"):
        net.zero_grad()
        net(big, snap, memory).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_resumed_in_another_mode_it_goes_on_the_same_way() -> None:
    def train(net: Reversible, optimizer: torch.optim.Optimizer, memory: str, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            net(halves(seed=step), Grid()(), memory).square().mean().backward()
            optimizer.step()

    nets = [body() for _ in range(3)]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-2) for n in nets]
    train(nets[0], optimizers[0], "full", range(4))
    train(nets[1], optimizers[1], "full", range(2))
    nets[2].load_state_dict(copy.deepcopy(nets[1].state_dict()))
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(nets[2], optimizers[2], "stored", range(2, 4))
    assert same(list(nets[2].state_dict().values()), list(nets[0].state_dict().values()))


@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it traces
def test_torch_compile_goes_around_it() -> None:
    net, snap = body(depth=1), Grid()()
    compiled = torch.compile(lambda a, b: net((a * 2, b), snap, "full").sin(), backend="eager")
    results = []
    for function in (lambda a, b: net((a * 2, b), snap, "stored").sin(), compiled):
        net.zero_grad()
        state = halves()
        out = function(*state)
        out.sum().backward()
        results.append([out.detach(), *(x.grad for x in state), *(p.grad for p in net.parameters())])
    assert same(*results)


def test_ddp_in_two_processes_gives_the_mean_of_two_images(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, ddp_driver.__file__, "1", str(tmp_path)]
    other = subprocess.Popen(command, cwd=root, env=environment(root))
    ddp_driver.main(0, tmp_path)  # this process is the first: torch is loaded here already
    assert other.wait(timeout=120) == 0
    net = ddp_driver.network()
    for image in ddp_driver.images():
        (net(image[None]).square().mean() / 2).backward()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert sorted(first) == sorted(k for k, _ in net.named_parameters())
    for name, parameter in net.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-5, atol=1e-7)


def environment(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
