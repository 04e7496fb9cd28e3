"""Weights that lower a validation loss: the step, its prediction, and what retraining says."""

from dataclasses import astuple

import pytest
import torch

from retrograd import Queries, attribute, retrain
from retrograd.errors import InputError
from retrograd.selection import reweight
from retrograd.selection.reweighting import STEPS, stepped
from tests.cases import CASES, EXAMPLES, RULES
from tests.test_mislabelled import blobs, initialise, planted

CLEAN, OTHER = blobs(60, 5), blobs(90, 6)


def mean_losses(run, data, rows):
    return retrain(run, Queries(data, of="losses", mean=True), rows).outcomes[:, 0]


def test_a_step_is_projected_gradient_descent():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(50, generator=generator, dtype=torch.float64)
    weights = stepped(torch.ones(50, dtype=torch.float64), torch.randn(50, generator=generator), 0.5, 2.0)
    small = stepped(torch.ones(50, dtype=torch.float64), slope, 0.01, 2.0)
    assert torch.allclose(small, 1 - 0.01 * (slope - slope.mean()) / slope.std(correction=0), atol=1e-12)
    for step in (0.3, 2.0, 100.0):
        found = stepped(weights, slope, step, 1.5)
        assert found.mean().item() == pytest.approx(1, abs=1e-12)
        assert found.min() >= 0
        assert found.max() <= 1.5
        # The nearest allowed point to the target: no other one has a smaller angle to what is left over.
        rest = weights - step * (slope - slope.mean()) / slope.std(correction=0) - found
        for _ in range(20):
            other = stepped(weights, torch.randn(50, generator=generator), 1.0, 1.5)
            assert rest @ (other - found) <= 1e-9
    assert torch.equal(stepped(weights, slope, 0.0, 2.0), weights)
    assert torch.equal(stepped(weights, torch.ones(50), 1.0, 2.0), weights)


@pytest.mark.parametrize("name", ["plain", "clipped"])
def test_small_steps_change_the_loss_as_predicted(name):
    case = CASES[name]
    run = case.record(RULES["momentum"])  # "clipped" has recorded weights other than 1
    found = reweight(run, case.queries, step=0.02)
    assert found.predicted is not None
    before, after = mean_losses(run, case.queries, torch.stack([torch.ones(EXAMPLES), found.weights]))
    assert found.predicted == pytest.approx((after - before).item(), rel=0.1)
    assert found.predicted < 0
    scores = attribute(run, Queries(case.queries, of="losses", mean=True), check_roughness=False).values[0] * case.all_weights
    assert torch.allclose(found.values, -scores, rtol=1e-12)
    assert found.predicted == pytest.approx((scores @ (found.weights - 1)).item(), rel=1e-12)


def test_the_best_step_of_a_grid_is_taken():
    run, flipped = planted()
    found = reweight(run, CLEAN)
    slope = -found.values
    rows = torch.stack([stepped(torch.ones_like(slope), slope, size, 2.0) for size in (0.0, *STEPS)])
    outcomes = mean_losses(run, CLEAN, rows)
    best = int(outcomes.argmin())
    assert best > 0
    assert torch.allclose(found.weights, rows[best])
    assert f"{STEPS[best - 1]:g}" in found.method
    assert found.weights[flipped].mean() < 0.5 < found.weights[~flipped].mean()
    assert found.weights.mean().item() == pytest.approx(1)
    assert found.weights.max() <= 2


def test_no_step_is_taken_where_none_helps():
    run, _ = planted()
    inputs, labels = CLEAN
    harmful = reweight(run, (inputs[:3], labels[:3]), step=[1e9], most=60.0)  # all weight on one example
    assert torch.equal(harmful.weights, torch.ones_like(harmful.weights))
    assert harmful.predicted == 0
    assert harmful.method == "reweighting, steps 0"


def test_rounds_go_on_from_the_reweighted_run():
    run, _ = planted(weighted=True)
    one, two = (reweight(run, CLEAN, step=0.3, rounds=rounds) for rounds in (1, 2))
    assert one.predicted is not None
    again = run.rerun(weights=one.weights)
    recorded = 0.5 + torch.arange(60, dtype=torch.float64) / 60
    slope = attribute(again, Queries(CLEAN, of="losses", mean=True), check_roughness=False).values[0] * recorded
    assert torch.allclose(two.weights, stepped(one.weights, slope, 0.3, 2.0), atol=1e-9)
    assert two.predicted == pytest.approx(one.predicted + (slope @ (two.weights - one.weights)).item(), rel=1e-6)
    losses = mean_losses(run, CLEAN, torch.stack([torch.ones(60), one.weights.float(), two.weights.float()]))
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(two.values, one.values)


def test_verification_has_a_control_and_intervals():
    run, _ = planted()
    found = reweight(run, CLEAN, verify=OTHER, step=[0.3, 1.0], draws=3, seed=2)
    assert list(found.verified) == ["selected", "permuted"]
    for one in found.verified.values():
        assert one.low <= one.change <= one.high
        assert one.seeds == 1
    assert found.verified["selected"].high < 0
    assert found.verified["selected"].change < found.verified["permuted"].change
    before, after = mean_losses(run, OTHER, torch.stack([torch.ones(60, dtype=torch.float64), found.weights]))
    assert found.verified["selected"].change == pytest.approx((after - before).item(), abs=1e-10)
    again = reweight(run, CLEAN, verify=OTHER, step=[0.3, 1.0], draws=3, seed=2)
    assert torch.allclose(found.weights, again.weights, atol=1e-12, rtol=0)
    for name, one in found.verified.items():  # equal up to rounding: how many are trained together is measured each time
        assert astuple(one) == pytest.approx(astuple(again.verified[name]), abs=1e-12)
    fresh = reweight(run, CLEAN, step=0.5, verify=OTHER, seeds=[1, 2], initialise=initialise)
    assert fresh.verified["selected"].seeds == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": CLEAN}, "60 examples are in both"),
        ({"verify": (CLEAN[0][:2], CLEAN[1][:2])}, "2 examples are in both"),
        ({"step": -1.0}, "step must be a number above 0"),
        ({"step": 0.0}, "step must be a number above 0"),
        ({"step": []}, "step must be a number above 0"),
        ({"rounds": 0}, "rounds and draws must be at least 1"),
        ({"most": 1.0}, "must be above 1, got 1.0"),
        ({"seeds": [1], "initialise": initialise}, "give other data to measure on as verify="),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        reweight(planted()[0], CLEAN, **options)
