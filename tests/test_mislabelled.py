"""Suspicion of wrong labels: every kind is its formula, planted flips are found, and removing them is verified."""

from dataclasses import astuple
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from retrograd import Classification, Examples, Queries, TracIn, Trajectory, attribute, record, retrain, self_influence
from retrograd.errors import InputError, NonFinite
from retrograd.evaluation import retraining
from retrograd.selection import find_mislabelled
from retrograd.selection.mislabelled import METHODS, halves, held_out_losses

TOTAL, FLIPPED = 60, 6


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes in the plane, a few standard deviations apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = 2.0 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]], dtype=torch.float64)
    return centres[labels] + 0.6 * torch.randn(count, 2, generator=generator, dtype=torch.float64), labels


def initialise(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@cache
def planted(weighted: bool = False) -> tuple[Trajectory, Tensor]:
    """A run on labels of which the first six, after a shuffle, are wrong; its ids start at 100."""
    inputs, labels = blobs(TOTAL, 0)
    flipped = torch.zeros(TOTAL, dtype=torch.bool)
    flipped[torch.randperm(TOTAL, generator=torch.Generator().manual_seed(1))[:FLIPPED]] = True
    data = Examples((inputs, torch.where(flipped, (labels + 1) % 3, labels)), torch.arange(TOTAL) + 100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = initialise(0)
    weights = 0.5 + torch.arange(TOTAL, dtype=torch.float64) / TOTAL if weighted else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    run = record(model, data, Classification(), optimizer=optimizer, epochs=4, batch_size=20, weights=weights)
    return run, flipped


@pytest.mark.parametrize("method", METHODS)
def test_planted_flips_are_found(method):
    run, flipped = planted()
    found = find_mislabelled(run, method=method, validation=blobs(60, 5))
    assert (found.weights == 0).sum() == FLIPPED
    assert found.method == method
    assert flipped[found.weights == 0].sum() >= 4  # at random 0.6 to be expected, and 4 in one of ten thousand
    assert torch.equal(found.example_ids, run.examples.ids)
    assert set(found.removed_ids.tolist()) == set(found.ranked(FLIPPED).tolist())
    assert found.verified == {}
    assert found.predicted is not None
    assert found.predicted < 0


def losses(run: Trajectory, step: int) -> Tensor:
    with torch.no_grad():
        return Queries(run.examples, of="losses").values(run.update_map, run.state(step))


def test_held_out_equals_a_loop_over_retrainings():
    run, _ = planted()
    kept = halves(TOTAL, 6, 3)
    total, times = torch.zeros(TOTAL, dtype=torch.float64), torch.zeros(TOTAL)
    for row in kept:
        again = run.rerun(weights=2.0 * row.double())
        for place in (~row).nonzero()[:, 0].tolist():
            total[place] += losses(again, len(again))[place]
            times[place] += 1
    assert (times == 3).all()
    found = find_mislabelled(run, subsets=6, seed=3).values
    assert torch.allclose(found, total / times, atol=1e-10, rtol=0)


def test_other_kinds_equal_their_formulas():
    run, _ = planted()
    clean = blobs(30, 5)
    values = {method: find_mislabelled(run, method=method, validation=clean, checkpoints=4).values for method in METHODS[1:]}
    assert torch.equal(values["loss"], losses(run, len(run)))
    steps = run.spread(4)
    assert torch.allclose(values["training_loss"], torch.stack([losses(run, step) for step in steps]).mean(0), rtol=1e-12)
    assert torch.equal(values["self_influence"], -self_influence(run, method=TracIn()))
    exact = attribute(run, Queries(clean, of="losses", mean=True), check_roughness=False)
    assert torch.equal(values["validation"], exact.values[0])
    assert torch.equal(
        find_mislabelled(run, method="self_influence", adjoint=TracIn(2)).values, -self_influence(run, method=TracIn(2))
    )


def test_the_predicted_change_is_minus_the_sum_of_scores():
    clean = blobs(30, 5)
    run, _ = planted()
    found = find_mislabelled(run, method="loss", validation=clean)
    scores = attribute(run, Queries(clean, of="losses", mean=True), check_roughness=False)
    assert found.predicted == pytest.approx(scores.predicted_change(found.removed_ids).item(), rel=1e-12)
    assert find_mislabelled(run, method="loss").predicted is None
    run, _ = planted(weighted=True)  # there, removal takes away the recorded weight
    found = find_mislabelled(run, method="loss", validation=clean, share=0.02)
    row = found.weights.double()[None]
    base, removed = retrain(run, Queries(clean, of="losses", mean=True), torch.cat([torch.ones_like(row), row])).outcomes[:, 0]
    assert found.predicted == pytest.approx((removed - base).item(), rel=0.3)  # one of sixty: not quite small


def test_verification_has_controls_and_intervals():
    run, _ = planted()
    other = blobs(60, 6)
    found = find_mislabelled(run, subsets=6, verify=other)
    assert list(found.verified) == ["selected", "random", "loss"]
    for one in found.verified.values():
        assert one.low <= one.change <= one.high
        assert one.seeds == 4
    assert found.verified["selected"].high < 0
    assert found.verified["selected"].change < found.verified["random"].change
    rows = torch.cat([torch.ones(1, TOTAL), found.weights[None].float()]).repeat_interleave(4, 0)
    outcomes = retrain(run, Queries(other, of="losses", mean=True), rows, removal="deletion").outcomes.view(2, 4).mean(1)
    assert found.verified["selected"].change == pytest.approx((outcomes[1] - outcomes[0]).item(), abs=1e-10)
    fresh = find_mislabelled(run, method="loss", verify=other, seeds=[1, 2], initialise=initialise)
    assert list(fresh.verified) == ["selected", "random"]
    assert fresh.verified["selected"].seeds == 2


def test_the_same_comes_out_each_time():
    run, _ = planted()
    first, second, other = (find_mislabelled(run, verify=blobs(20, 6), repeats=1, subsets=2, seed=seed) for seed in (1, 1, 2))
    assert torch.allclose(first.values, second.values, atol=1e-12, rtol=0)
    for name, one in first.verified.items():  # equal up to rounding: how many are trained together is measured each time
        assert astuple(one) == pytest.approx(astuple(second.verified[name]), abs=1e-12)
    assert not torch.allclose(first.values, other.values, atol=1e-3)


def test_halves_leave_each_example_out_equally_often():
    for total in (7, 8):
        kept = halves(total, 6, 0)
        assert kept.shape == (6, total)
        assert (kept.sum(0) == 3).all()
        assert torch.equal(kept[::2], ~kept[1::2])
        assert (kept[::2].sum(1) == total // 2).all()


def test_a_diverged_half_is_left_out(monkeypatch):
    run, _ = planted()
    whole = held_out_losses(run, 4)
    plain = retraining.retrain

    def broken(rows: list[int]):
        def retrained(*args, **options):
            found = plain(*args, **options)
            found.values[rows] = torch.nan
            return found

        return retrained

    monkeypatch.setattr("retrograd.selection.mislabelled.retrain", broken([0]))
    assert held_out_losses(run, 4).isfinite().all()
    assert not torch.equal(held_out_losses(run, 4), whole)
    monkeypatch.setattr("retrograd.selection.mislabelled.retrain", broken([0, 2]))
    with pytest.raises(NonFinite, match="all retrainings without them became non-finite"):
        held_out_losses(run, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share is the share"),
        ({"share": 1.0}, "some must stay"),
        ({"subsets": 5}, "even and at least 2, got 5"),
        ({"method": "training_loss", "checkpoints": 0}, "checkpoints and repeats must be at least 1"),
        ({"method": "validation"}, "give some as validation="),
        ({"seeds": [1], "initialise": initialise}, "give data to measure on as verify="),
        (
            {"method": "validation", "validation": blobs(9, 5), "verify": blobs(6, 5)},
            "are in both the validation data and verify=",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    if "are in both" in message:  # the first rows of a longer draw, so that contents agree
        inputs, labels = blobs(9, 5)
        options = {**options, "verify": (inputs[:6], labels[:6])}
    with pytest.raises(InputError, match=message):
        find_mislabelled(planted()[0], **options)
