"""Losses of change networks beyond their golden cases: limits, absent classes, nothing to learn from, finite always."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.learning.change_losses import (
    BINARY,
    MAMBAFCS,
    MAMBASCD,
    Triple,
    binary_change_terms,
    cross_entropy,
    lovasz_softmax,
    published_sek_loss,
    sek_loss,
    semantic_change_terms,
    weighted,
)
from pipelines.learning.losses import IGNORED


def batch(seed: int, classes: int = 7, *, certain: float | None = None) -> tuple[Triple, Triple]:
    """Labels of (2, 10, 9) pixels; scores random, or `certain` times the right answer."""
    rng = torch.Generator().manual_seed(seed)
    change = (torch.rand(2, 10, 9, generator=rng) < 0.5).long()
    dates = [change * torch.randint(1, classes, change.shape, generator=rng) for _ in range(2)]
    labels = Triple(change, *dates)
    if certain is not None:
        return Triple(*(certain * one_hot(label, k) for label, k in zip(labels, (2, classes, classes)))), labels
    drawn = (torch.randn(2, k, 10, 9, generator=rng).requires_grad_() for k in (2, classes, classes))
    return Triple(*drawn), labels


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).movedim(-1, 1).float()


def test_sek_is_finite_where_the_published_one_is_not() -> None:
    broken = 0
    for seed in range(20):
        scores, labels = batch(seed)
        broken += bool(published_sek_loss(scores, labels).isnan())
        loss = sek_loss(scores, labels)
        loss.backward()
        assert loss.isfinite()
        assert scores.earlier.grad is not None
        assert scores.earlier.grad.isfinite().all()
        assert scores.earlier.grad.any()
    assert broken > 3  # random logits agree less than chance in about half of the draws


def test_sek_does_not_see_a_class_that_is_absent() -> None:
    scores, labels = batch(0, 5, certain=2.0)
    longer = Triple(scores.change, *(F.pad(s, (0, 0, 0, 0, 0, 1), value=-60.0) for s in scores[1:]))
    torch.testing.assert_close(sek_loss(longer, labels), sek_loss(scores, labels))
    assert published_sek_loss(longer, labels) > published_sek_loss(scores, labels) + 1


def test_published_sek_counts_what_is_said_of_changed_pixels_labelled_unchanged() -> None:
    """They are in no column of kappa's matrix, yet in the unions: pixels sure of class 1 there cost overlap."""
    scores, labels = batch(4, 5, certain=1.0)
    earlier = labels.earlier.clone()
    earlier[0, :3] = 0
    partly = labels._replace(change=torch.ones_like(labels.change), earlier=earlier)
    sure = scores.earlier.clone()
    sure[0, :, :3] = torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0])[:, None, None]
    kept = sure.clone()
    kept[0, :, :3] = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0])[:, None, None]
    costs = [published_sek_loss(scores._replace(earlier=one), partly) for one in (sure, kept)]
    assert costs[0] > costs[1] + 0.01
    same = [sek_loss(scores._replace(earlier=one), partly) for one in (sure, kept)]
    torch.testing.assert_close(*same)


def test_perfect_scores_cost_nothing_and_no_change_gives_no_sek() -> None:
    scores, labels = batch(1, certain=100.0)
    terms = semantic_change_terms(scores, labels, sek=sek_loss)
    assert set(terms) == set(MAMBAFCS) == set(MAMBASCD) | {"sek"}
    for name, value in terms.items():
        torch.testing.assert_close(value, torch.tensor(0.0), msg=name)
    still = Triple(*(torch.zeros_like(label) for label in labels))
    random, _ = batch(2)
    assert float(sek_loss(random, still)) == float(published_sek_loss(random, still)) == 0.0
    weighted(semantic_change_terms(random, still, sek=sek_loss), MAMBAFCS).backward()  # all semantic labels ignored


def test_weights_add_up() -> None:
    scores, labels = batch(3)
    terms = binary_change_terms(scores.change, labels.change)
    torch.testing.assert_close(weighted(terms, BINARY), terms["ce_cd"] + 0.75 * terms["lovasz_cd"])


def test_lovasz_is_the_jaccard_loss_at_the_corners() -> None:
    labels = torch.tensor([[[0, 0, 1, 1, 1]]])
    guess = torch.tensor([[[0, 1, 1, 1, 0]]])
    got = lovasz_softmax(1000 * one_hot(guess, 2), labels)
    assert float(got) == pytest.approx(((1 - 1 / 3) + (1 - 2 / 4)) / 2)
    hidden = torch.where(guess == labels, labels, IGNORED)
    assert float(lovasz_softmax(1000 * one_hot(guess, 2), hidden)) == 0.0


def test_ignored_labels_take_no_part() -> None:
    scores, labels = batch(4)
    half = labels.change.clone()
    half[:, 5:] = IGNORED
    torch.testing.assert_close(
        cross_entropy(scores.change, half), F.cross_entropy(scores.change[:, :, :5], half[:, :5])
    )
    nothing = torch.full_like(half, IGNORED)
    assert not cross_entropy(scores.change, nothing)
    assert not lovasz_softmax(scores.change, nothing)
