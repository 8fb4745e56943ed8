"""A convolution of one small image rounds as that of a batch, forward and backward, and torch alone would not."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.layers.onednn import FEW, by_columns, one_dnn
from medmamba.nets.mamba_unet import MambaUNet, MambaUNetConfig

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
SHAPES = [(5, 9, 8, 7), (4, 16, 16, 16), (6, 20, 21)]


def passes(x: Tensor, weight: Tensor, bias: Tensor, **more: int) -> list[Tensor]:
    """Output and gradients of x, weight and bias."""
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with one_dnn(x):
        out = conv(*leaves, padding=1, **more)
        out.backward(out.detach().sin())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_one_image_is_convolved_as_in_a_batch(shape: tuple[int, ...], stride: int) -> None:
    torch.manual_seed(0)
    x, rank = torch.randn(1, *shape), len(shape) - 1
    weight, bias = torch.randn(3, shape[0], *[3] * rank), torch.randn(3)
    out, *grads = passes(x, weight, bias, stride=stride)
    pair, *both = passes(torch.cat([x, x]), weight, bias, stride=stride)
    assert torch.equal(out[0], pair[0])
    assert len(grads) == len(both) == 3
    assert torch.equal(grads[0][0], both[0][0])
    for ours, twice in zip(grads[1:], both[1:], strict=True):
        torch.testing.assert_close(2 * ours, twice, rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_float64() -> None:
    torch.manual_seed(0)
    given = torch.randn(1, 4, 6, 7, 8), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    exact = passes(*(t.double() for t in given))
    for ours, theirs in zip(passes(*given), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_it_changes_what_torch_would_do_by_columns_and_nothing_else() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 16, 16, 16), torch.randn(4, 4, 3, 3, 3)
    assert by_columns(x, transposed=False, groups=1)
    with one_dnn(x):
        inside = F.conv3d(x, weight, padding=1)
    assert not torch.equal(inside, F.conv3d(x, weight, padding=1))
    assert torch.equal(inside[0], F.conv3d(torch.cat([x, x]), weight, padding=1)[0])
    for other in (x.double(), torch.cat([x, x]), torch.randn(1, FEW // 4, 2, 3, 1), x[0]):
        assert not by_columns(other, transposed=False, groups=1)
    assert isinstance(one_dnn(torch.cat([x, x])), nullcontext)
    assert not by_columns(x, transposed=True, groups=1)
    assert not by_columns(x, transposed=False, groups=2)


def test_a_recomputed_network_has_the_gradients_of_the_stored_one() -> None:
    torch.manual_seed(0)
    network = MambaUNet(MambaUNetConfig(widths=(8, 16), depths=(1, 1), state=2))
    x, found = torch.randn(1, 1, 12, 12, 12), {}
    for memory in ("stored", "full"):
        network.memory = memory
        network.zero_grad()
        with one_dnn(x):
            network(x).square().mean().backward()
        found[memory] = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found["stored"]) == len(list(network.parameters()))
    assert all(map(torch.equal, found["stored"], found["full"]))
