"""The run that matches a counterfactual, and the roughness that says whether a derivative is to be trusted."""

import warnings

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from retrograd import Counterfactual, Regression, Unrolled, attribute, record, roughness
from retrograd.errors import InputError, RoughTraining

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(12, 3, generator=DRAW, dtype=torch.float64)
TARGETS = INPUTS[:, :1].sin() + 0.1 * torch.randn(12, 1, generator=DRAW, dtype=torch.float64)
QUERIES = (INPUTS[:3] + 0.1, TARGETS[:3])


def train(optimizer, activation=nn.Tanh, epochs=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 1)).double()
    given = {"optimizer": optimizer, "epochs": epochs, "batch_size": 5, **options}
    return record(model, (INPUTS, TARGETS), Regression("prediction"), **given)


def sgd(rate):
    return lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9)


def adam(rate):
    return lambda p: torch.optim.Adam(p, lr=rate)


def params(run):
    return torch.cat([leaf.flatten() for leaf in run.final_state.params.values()])


def test_matching_runs_are_what_they_say():
    run = train(sgd(0.05))
    deleted = run.matching(Counterfactual(0.5, "deletion"))
    weighted = run.matching(Counterfactual(0.5, "zero_weight"))
    assert torch.equal(params(deleted), params(train(sgd(0.025))))
    halves = torch.full((12,), 0.5, dtype=torch.float64)
    assert torch.equal(params(weighted), params(train(sgd(0.05), weights=halves)))
    # Half the weights are half the learning rate for SGD, and next to nothing for Adam.
    assert torch.allclose(params(deleted), params(weighted), atol=1e-12)
    other = train(adam(0.05))
    moved = [(params(other.matching(Counterfactual(0.5, how))) - params(other)).norm() for how in ("zero_weight", "deletion")]
    assert moved[0] < 1e-4 < 1e-1 < moved[1]


def test_recording_the_matching_run_is_the_same_as_asking_for_it():
    run, matched = train(sgd(0.05)), train(sgd(0.05), keep=0.5, removal="deletion")
    exact = Unrolled(route="loop")  # "auto" may choose either route, which differ by rounding
    asked = attribute(run, QUERIES, method=exact, keep=0.5, removal="deletion", check_roughness=False)
    given = attribute(matched, QUERIES, method=exact, check_roughness=False)
    assert torch.equal(asked.values, given.values)
    assert asked.counterfactual == given.counterfactual == Counterfactual(0.5, "deletion")
    assert not torch.allclose(asked.values, attribute(run, QUERIES, check_roughness=False).values, rtol=1e-2)
    with pytest.raises(InputError, match="cannot stand for"):
        attribute(matched, QUERIES, keep=0.25, removal="deletion")


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.5}, {"removal": "burning"}, {"seeds": "old"}])
def test_impossible_counterfactuals(wrong):
    with pytest.raises((InputError, TypeCheckError), match=r"keep|removal|seeds"):
        Counterfactual(**wrong)


def test_a_linear_model_is_smooth():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    run = record(model, (INPUTS, TARGETS), Regression("prediction"), optimizer=sgd(0.01), epochs=5, batch_size=4)
    found = roughness(run, size=1e-3)
    assert found.metasmoothness > 0.999
    assert found.amplification < 1.5
    assert not found.rough


def test_rough_training_is_found_and_warned_of():
    run = train(adam(0.5), activation=nn.ReLU, epochs=40)
    found = roughness(run)
    assert found.rough
    with pytest.warns(RoughTraining, match="metasmoothness"):
        scores = attribute(run, QUERIES)
    assert scores.notes["amplification"] == found.amplification
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(train(sgd(0.01)), QUERIES)
