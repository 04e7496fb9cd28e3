"""Checkpoints from elsewhere: TracIn reads them, methods that replay say what they miss."""

import pytest
import torch
from torch import nn

from retrograd import CheckpointSeries, Classification, Regression, TracIn, Unrolled, attribute
from retrograd.errors import InputError, ModelChanged, NotRecorded

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 3, generator=DRAW), torch.randn(6, 2, generator=DRAW)
QUERIES = X[:2] * 0.5, Y[:2]
STATES = {step: {"weight": torch.randn(2, 3, generator=DRAW), "bias": torch.randn(2, generator=DRAW)} for step in (10, 20, 40)}


def series(states=STATES, learning_rate=0.1, model=None):
    return CheckpointSeries(model or nn.Linear(3, 2), (X, Y), Regression("loss"), states, learning_rate=learning_rate)


@pytest.mark.parametrize("rate", [0.1, [0.1, 0.2, 0.3]])
def test_tracin_is_the_sum_over_checkpoints(rate):
    """Written out: − Σ_c η_c · steps_c / N · ⟨∇f(θ_c), ∇ℓ_i(θ_c)⟩; stretches end halfway between checkpoints."""
    steps = {10: 15.0, 20: 15.0, 40: 10.0}
    rates = rate if isinstance(rate, list) else [rate] * 3
    expected = torch.zeros(2, 6)
    for (step, state), own in zip(STATES.items(), rates, strict=True):
        leaves = [leaf.clone().requires_grad_() for leaf in (state["weight"], state["bias"])]

        def gradients(inputs, targets, leaves=leaves):
            losses = (inputs @ leaves[0].T + leaves[1] - targets).square().mean(1)
            return torch.stack(
                [torch.cat([g.flatten() for g in torch.autograd.grad(one, leaves, retain_graph=True)]) for one in losses]
            )

        expected -= own * steps[step] / 6 * gradients(*QUERIES) @ gradients(X, Y).T
    found = attribute(series(learning_rate=rate), QUERIES, method=TracIn([10, 20, 40]))
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-6)
    assert found.trajectory_digest == series().digest


def test_states_are_those_given_in_order_of_steps():
    shuffled = {step: STATES[step] for step in (40, 10, 20)}
    found = series(shuffled)
    assert len(found) == 40
    assert found.digest == series().digest
    assert torch.equal(found.final_state.params["weight"], STATES[40]["weight"])
    assert torch.equal(found.state(0).params["weight"], STATES[10]["weight"])
    assert found.state(20).step == 20
    with pytest.raises(NotRecorded, match=r"no checkpoint of step 30. Given: 10, 20, 40"):
        found.state(30)


def test_digest_sees_states_steps_and_data():
    moved = {**STATES, 20: {**STATES[20], "bias": STATES[20]["bias"] + 1e-6}}
    others = [series(moved), series({step + 1: state for step, state in STATES.items()})]
    others.append(CheckpointSeries(nn.Linear(3, 2), (X + 1, Y), Regression("loss"), STATES, learning_rate=0.1))
    assert len({series().digest, *(other.digest for other in others)}) == 4


def test_given_tensors_may_change_afterwards():
    states = {10: {name: leaf.clone() for name, leaf in STATES[10].items()}}
    found = series(states)
    states[10]["weight"].zero_()
    assert torch.equal(found.final_state.params["weight"], STATES[10]["weight"])


def test_methods_that_replay_say_what_is_missing():
    with pytest.raises(NotRecorded, match=r"only a list of checkpoints.*TracIn"):
        attribute(series(), QUERIES, method=Unrolled())


@pytest.mark.parametrize("removal", ["deletion", "zero_weight"])
def test_another_training_time_cannot_be_made(removal):
    with pytest.raises(NotRecorded, match="matched training time"):
        attribute(series(), QUERIES, method=TracIn(3), keep=0.5, removal=removal)


def test_keep_of_one_is_the_series_itself():
    plain, asked = attribute(series(), QUERIES, method=TracIn(3)), attribute(series(), QUERIES, method=TracIn(3), keep=1.0)
    assert torch.equal(plain.values, asked.values)


def test_buffers_come_from_the_checkpoint():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    state["1.running_mean"] = torch.tensor([1.0, 2.0])
    found = CheckpointSeries(model, (X, torch.tensor([0, 1] * 3)), Classification(), {5: state}, learning_rate=0.1)
    assert found.final_state.buffers["1.running_mean"].tolist() == [1.0, 2.0]
    assert model[1].running_mean.tolist() == [0.0, 0.0]


def test_wrong_input():
    with pytest.raises(InputError, match="at least one checkpoint"):
        series({})
    with pytest.raises(InputError, match="one for each of 3 checkpoints, got 2"):
        series(learning_rate=[0.1, 0.2])
    with pytest.raises(ModelChanged, match=r"step 10 lacks the parameters \['bias'\]"):
        series({10: {"weight": STATES[10]["weight"]}})
    with pytest.raises(ModelChanged, match=r"\['weight', 'bias'\] in the checkpoint of step 10 have other shapes"):
        series({10: STATES[10]}, model=nn.Linear(3, 4))
