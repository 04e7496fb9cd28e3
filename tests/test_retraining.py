"""Batched retraining against training one model after the other, and the linear datamodeling score against scipy."""

import pytest
import scipy.stats
import torch
from jaxtyping import TypeCheckError
from torch import nn

from retrograd import (
    Examples,
    Regression,
    Unrolled,
    attribute,
    linear_datamodeling_score,
    random_subsets,
    record,
    retrain,
)
from retrograd.errors import InputError
from retrograd.trajectory import batch_order

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(14, 3, generator=DRAW, dtype=torch.float64)
TARGETS = torch.randn(14, 1, generator=DRAW, dtype=torch.float64)
QUERIES = (torch.randn(4, 3, generator=DRAW, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
TASK = Regression("prediction")


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    between = {"plain": [nn.Tanh()], "norm": [nn.BatchNorm1d(5), nn.Tanh()], "dropout": [nn.Tanh(), nn.Dropout(0.3)]}[kind]
    return nn.Sequential(nn.Linear(3, 5), *between, nn.Linear(5, 1)).double()


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def trained(kind: str, optimizer: str, **options):
    given = {"epochs": 3, "batch_size": 4, "clip_norm": 0.5, **options}
    return record(network(kind), (INPUTS, TARGETS), TASK, optimizer=OPTIMIZERS[optimizer], **given)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["plain", "norm", "dropout"])
def test_zero_weight_equals_one_rerun_after_the_other(kind, optimizer):
    run = trained(kind, optimizer, weights=torch.linspace(0.5, 1.5, 14))
    kept = random_subsets(run, 5, 0.5, seed=3)
    found = retrain(run, QUERIES, kept, chunk=2)
    for subset, row in zip(kept, found, strict=True):
        alone = run.rerun(weights=subset.double()).measurements(QUERIES)
        assert torch.allclose(row, alone, atol=1e-10, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    everything = retrain(run, QUERIES, torch.ones(1, 14, dtype=torch.bool))
    assert torch.allclose(everything[0], run.measurements(QUERIES), atol=1e-10, rtol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 1.5, 14)], ids=["ones", "weighted"])
def test_deletion_equals_training_on_the_subset(optimizer, weights):
    run = trained("plain", optimizer, weights=weights)
    kept = random_subsets(run, 3, 0.5, seed=3)
    found = retrain(run, QUERIES, kept, removal="deletion", seed=2)
    assert torch.equal(found, retrain(run, QUERIES, kept, removal="deletion", seed=2, chunk=2))
    for number, (subset, row) in enumerate(zip(kept, found, strict=True)):
        ids = run.examples.ids[subset]
        order = batch_order(Examples(torch.zeros(len(ids)), ids), 3, 4, 2 * 1_000_003 + number)
        alone = trained("plain", optimizer, epochs=None, batch_size=None, order=order, weights=weights).measurements(QUERIES)
        assert torch.allclose(row, alone, atol=1e-10, rtol=0)


def test_subsets_have_the_size_that_was_asked_for():
    run = trained("plain", "adam")
    kept = random_subsets(run, 200, 0.5, seed=0)
    assert kept.shape == (200, 14)
    assert (kept.sum(1) == 7).all()
    assert 70 < kept.sum(0).min() <= kept.sum(0).max() < 130  # every example stays about half of the time
    assert torch.equal(kept, random_subsets(run, 200, 0.5, seed=0))
    with pytest.raises(InputError, match="0 < keep"):
        random_subsets(run, 2, 0.0)


def test_bad_masks():
    run = trained("plain", "adam")
    for wrong in (torch.ones(2, 13, dtype=torch.bool), torch.ones(14, dtype=torch.bool)):
        with pytest.raises((InputError, TypeCheckError), match=r"subset"):
            retrain(run, QUERIES, wrong)
    uneven = torch.ones(2, 14, dtype=torch.bool)
    uneven[0, 0] = False
    with pytest.raises(InputError, match="equal size"):
        retrain(run, QUERIES, uneven, removal="deletion")


def test_predictions_agree_with_retraining():
    """Small removals from a smooth training: the derivative must foretell the change itself, not only its order."""
    run = trained("plain", "momentum", clip_norm=None)
    scores = attribute(run, QUERIES, method=Unrolled(), check_roughness=False)
    gone = ~torch.eye(14, dtype=torch.bool)  # each example left out once
    actual = retrain(run, QUERIES, gone) - run.measurements(QUERIES)
    predicted = torch.stack([scores.predicted_change(removed=[number]) for number in range(14)])
    assert torch.allclose(predicted, scores.predicted_subset(gone))
    slope = (predicted * actual).sum() / (predicted * predicted).sum()
    assert 0.8 < slope < 1.25
    assert linear_datamodeling_score(predicted, actual, ranks=False).value > 0.95


def test_score_of_several_runs_is_their_mean():
    first, second = trained("plain", "momentum"), trained("plain", "momentum", seed=1)
    both = attribute([first, second], QUERIES, check_roughness=False)
    alone = [attribute(run, QUERIES, check_roughness=False).values for run in (first, second)]
    assert torch.allclose(both.values, (alone[0] + alone[1]) / 2)
    assert both.notes["runs"] == 2
    assert both.trajectory_digest == f"{first.digest},{second.digest}"


@pytest.mark.parametrize("ranks", [True, False])
def test_agreement_equals_scipy(ranks):
    draw = torch.Generator().manual_seed(1)
    predicted = torch.randint(0, 6, (30, 4), generator=draw).double()  # with ties
    actual = predicted + 2 * torch.randn(30, 4, generator=draw)
    found = linear_datamodeling_score(predicted, actual, ranks=ranks)
    measure = scipy.stats.spearmanr if ranks else scipy.stats.pearsonr
    expected = [measure(predicted[:, query], actual[:, query]).statistic for query in range(4)]
    assert torch.allclose(found.per_query, torch.tensor(expected, dtype=torch.float64))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(sum(expected) / 4)
    with pytest.raises(InputError, match="at least 3 subsets"):
        linear_datamodeling_score(predicted[:2], actual[:2])
