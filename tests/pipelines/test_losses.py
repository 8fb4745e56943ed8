"""The loss against MONAI's, cells without a label, and sums over processes."""

from __future__ import annotations

import pytest
import torch

from pipelines.learning.losses import IGNORED, dice_ce


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 3, 4, 5), (3, 4, 6, 2, 3)])
def test_equals_monai(shape: tuple[int, ...]) -> None:
    from monai.losses import DiceCELoss

    torch.manual_seed(0)
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]))
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(scores, labels)
    (wanted,) = torch.autograd.grad(theirs, scores)
    ours = dice_ce(scores, labels)
    (gradient,) = torch.autograd.grad(ours, scores)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, wanted)


def test_ignored_cells_enter_no_sum() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 8, 6, requires_grad=True)
    labels = torch.randint(0, 3, (2, 1, 8, 6))
    labels[:, :, 5:] = IGNORED
    loss = dice_ce(scores, labels)
    torch.testing.assert_close(loss, dice_ce(scores[:, :, :5], labels[:, :, :5]))
    loss.backward()
    assert scores.grad is not None
    assert not scores.grad[:, :, 5:].any()
    assert scores.grad[:, :, :5].all()


def test_nothing_labelled_is_finite() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = dice_ce(scores, torch.full((1, 1, 4, 4), IGNORED))
    loss.backward()
    assert scores.grad is not None
    assert torch.isfinite(loss)
    assert not scores.grad.any()
