"""Verdicts on hypergradients that are right, wrong, or of no use."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograd import Hypergradient, Outcome, Regression, Trajectory, Unrolled, chain, hypergradient, record, verify
from retrograd.errors import InputError, UntrustedGradient
from tests.cases import CASES, RULES, WEIGHTS, normal
from tests.setups import SETUPS

FEW = (1e-2, 1e-4, 1e-5)


def scaled(gradient: Hypergradient, factor: float) -> Hypergradient:
    values = {
        name: {key: factor * leaf for key, leaf in own.items()} if isinstance(own, dict) else factor * own
        for name, own in gradient.values.items()
    }
    return replace(gradient, values=values)


def total(model: Any) -> Tensor:
    return model.weight.sum()


def squared(model: Any) -> Tensor:
    return model.weight.square().sum()


def of_quadratic(steps: int = 5) -> tuple[Trajectory, Outcome]:
    """θ is linear in weights and start, and a polynomial in the rate."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    data = (torch.ones(2, 1, dtype=torch.float64), torch.tensor([[2.0], [4.0]], dtype=torch.float64))
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    run = record(model, data, Regression(), optimizer=sgd, order=torch.arange(2).expand(steps, -1))
    return run, Outcome(total)


# ---------------------------------------------------------------------------------------------------------------------
# Right and wrong


def test_a_right_gradient_has_a_v_of_errors_and_is_trusted():
    run, names = CASES["plain"].record(RULES["momentum"]), ("example_weights", "learning_rate", "initial_params")
    gradient = hypergradient(run, CASES["plain"].queries, names)
    found = verify(run, CASES["plain"].queries, gradient, directions=2, sizes=(1e-1, 1e-3, 1e-5, 1e-9, 1e-13))
    assert found.trusted
    assert found.smooth
    assert found.error < 1e-6
    assert found.errors.shape == (2, 5)
    for row in found.errors:
        bottom = int(row.argmin())
        assert 0 < bottom < 4
        assert row[0] > 1e3 * row[bottom] < row[-1]  # curvature to one side, rounding to the other
        assert (row[: bottom + 1].diff() < 0).all()
    torch.testing.assert_close(found.predicted, found.actual, rtol=1e-6, atol=0)
    for one in (True, False):  # the same seed, the same directions
        again = verify(run, CASES["plain"].queries, gradient, sizes=FEW, seed=0 if one else 1)
        assert torch.equal(again.predicted[:1], found.predicted[:1]) is one


@pytest.mark.parametrize("factor", [1.2, -1.0, 0.8, 0.0])
def test_a_wrong_gradient_is_not_trusted(factor: float):
    run, queries = CASES["plain"].record(RULES["momentum"]), CASES["plain"].queries
    gradient = hypergradient(run, queries, ("example_weights", "learning_rate"))
    found = verify(run, queries, scaled(gradient, factor), sizes=FEW)
    assert not found.trusted
    assert found.smooth
    if factor:
        assert found.error == pytest.approx(abs(1 / factor - 1), rel=0.2)
    assert str(found).startswith("NOT to be trusted: the derivative differs from retraining by")


def test_a_truncated_gradient_is_not_trusted_and_doubted():
    run, outcome = of_quadratic()
    with pytest.warns(UntrustedGradient):
        gradient = hypergradient(run, outcome, "learning_rate", method=Unrolled(last=1))
    found = verify(run, outcome, gradient, sizes=FEW)
    assert not found.trusted
    assert "doubt: only the last 1 of 5 steps are differentiated through" in str(found)


def test_one_size_alone_may_blame_a_right_gradient():
    """AdamW at its own ε divides small gradients by their size: a change of .1 is no small one."""
    case, rule = CASES["plain"], replace(RULES["adamw"], options={"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-8})
    run = case.record(rule)
    gradient = hypergradient(run, case.queries, "initial_params")
    large = verify(run, case.queries, gradient, sizes=(1.0, 0.3))
    assert large.error > 0.2
    assert not large.trusted
    whole = verify(run, case.queries, gradient, sizes=(1e-2, 1e-4, 1e-6))
    assert whole.error < 1e-4
    assert whole.trusted


class Jumps(nn.Module):
    """|cos| of a large multiple: every step throws the parameter elsewhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (6 * self.weight * inputs).sin().sum(1, keepdim=True)


def test_a_rough_run_is_right_and_of_no_use():
    data = (1 + 0.1 * normal(4, 3, seed=1), torch.zeros(4, 1, dtype=torch.float64))
    run = record(
        Jumps(), data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.3), order=torch.arange(4).expand(6, -1)
    )
    outcome = Outcome(total)
    gradient = hypergradient(run, outcome, "initial_params")
    found = verify(run, outcome, gradient, directions=2, sizes=(1e-1, 1e-6, 1e-7, 1e-8))
    assert found.error < 1e-2
    assert not found.smooth
    assert not found.trusted
    assert "too rough for finite changes to follow" in str(found)


def test_where_training_diverges_there_is_no_difference():
    run, outcome = of_quadratic(10)
    gradient = hypergradient(run, outcome, "learning_rate")
    found = verify(run, outcome, gradient, sizes=(1e60, 1e50))
    assert found.errors.isnan().all()
    assert found.error == float("inf")
    assert not found.smooth
    assert "inf" in str(found)


# ---------------------------------------------------------------------------------------------------------------------
# Every input


@pytest.mark.parametrize("rule", ["adamw", "rmsprop momentum"])
def test_every_input_of_a_run_by_itself(rule: str):
    """Recorded weights that are not 1, a clipping norm, meta-parameters, momentum next to 1, decay."""
    setup = SETUPS["everything"]
    run = setup.record(RULES[rule])
    names = run.update_map.inputs_of(run.inputs(0)) - {"dampening", "epsilon_root", "centered"}
    names |= {"example_weights", "initial_params"}
    gradient = hypergradient(run, setup.case.queries, names)
    for name in sorted(names):
        found = verify(run, setup.case.queries, gradient, names=[name], sizes=(1e-4,))
        assert found.error < 1e-3, name
        assert found.trusted, name
    assert verify(run, setup.case.queries, gradient, sizes=(1e-4,)).error < 1e-3


def test_momentum_is_not_moved_past_1():
    case, rule = CASES["plain"], replace(RULES["momentum"], options={"lr": 0.02, "momentum": 0.99})
    run = case.record(rule)
    gradient = hypergradient(run, case.queries, ("momentum", "learning_rate"))
    assert verify(run, case.queries, gradient).trusted


def test_a_hyperparameter_that_is_0_is_moved_too():
    case = CASES["plain"]
    run = case.record(RULES["sgd"])
    gradient = hypergradient(run, case.queries, "weight_decay")
    found = verify(run, case.queries, gradient, sizes=(1e-2, 1e-4))
    assert found.trusted
    assert found.predicted.abs().item() > 1e-4
    assert not verify(run, case.queries, scaled(gradient, 1.2), sizes=(1e-2, 1e-4)).trusted


def test_weights_are_those_that_were_recorded():
    case = replace(CASES["plain"], weights=WEIGHTS.clone())
    assert case.weights is not None
    case.weights[3] = 0.0
    run = case.record(RULES["momentum"])
    gradient = hypergradient(run, case.queries, "example_weights")
    assert verify(run, case.queries, gradient, sizes=FEW).error < 1e-5
    records = [replace(one, weights=torch.full((len(one.example_ids),), 1.0 + step)) for step, one in enumerate(run.records)]
    changing = Trajectory(run.update_map, run.examples, records, run.checkpoints, run.schedule)
    with pytest.raises(InputError, match="another weight in another step"):
        verify(changing, case.queries, gradient)


class Keyed:
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["pixels"])[:, 0] - batch["value"]).square()

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["pixels"])[:, 0]


def test_batches_that_are_dicts():
    data = {"pixels": normal(5, 3, seed=1), "value": normal(5, seed=2)}
    model = nn.Linear(3, 1).double()
    model.load_state_dict({"weight": normal(1, 3, seed=3), "bias": normal(1, seed=4)})
    run = record(model, data, Keyed(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05), epochs=2, batch_size=2)
    outcome = Outcome(squared)
    gradient = hypergradient(run, outcome, ("pixels", "value"))
    assert verify(run, outcome, gradient, sizes=FEW).trusted
    assert not verify(run, outcome, scaled(gradient, 1.2), sizes=FEW).trusted


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_of_a_chain(stage: int):
    first = CASES["plain"].record(RULES["momentum"])
    model, queries = CASES["plain"].model(), CASES["plain"].queries
    taken = {name: leaf for name, leaf in first.final_state.params.items() if "4" not in name}  # but for the last layer
    model.load_state_dict({**model.state_dict(), **taken})
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    second = record(model, queries, CASES["plain"].task, optimizer=sgd, epochs=2, batch_size=2)
    both, asked = chain(first, second), CASES["plain"].examples
    gradient = hypergradient(both, asked, ("learning_rate", "initial_params", "example_weights"))[stage]
    assert verify(both, asked, gradient, stage=stage, sizes=(1e-2, 1e-4)).trusted
    assert not verify(both, asked, scaled(gradient, 1.2), stage=stage, sizes=(1e-4,)).trusted
    for name in gradient.values:
        assert verify(both, asked, gradient, names=[name], stage=stage, sizes=(1e-4,)).error < 1e-4, name


# ---------------------------------------------------------------------------------------------------------------------
# What it says, and what can't be asked


def test_the_verdict_in_words():
    run, outcome = of_quadratic()
    gradient = hypergradient(run, outcome, "example_weights")
    lines = str(verify(run, outcome, gradient, sizes=(1e-1, 1e-2))).splitlines()
    assert lines[0].startswith("trusted: the derivative differs from retraining by ")
    assert lines[0].endswith("random directions: 1)")
    assert lines[1].startswith("largest error for each h: 0.1: ")
    assert lines[2].startswith("predicts changes of up to 0.")
    assert lines[3] == "metasmoothness 1.00: finite changes follow it"
    assert len(lines) == 4


def test_what_cannot_be_verified_is_refused():
    run, outcome = of_quadratic()
    gradient = hypergradient(run, outcome, "learning_rate")
    wrong: tuple[dict[str, Any], ...] = ({"directions": 0}, {"sizes": ()}, {"sizes": (0.1, -0.1)})
    for options in wrong:
        with pytest.raises(InputError, match="at least one direction, and sizes above 0"):
            verify(run, outcome, gradient, **options)
    with pytest.raises(InputError, match="no derivative by 'weight_decay'"):
        verify(run, outcome, gradient, names=["weight_decay"])
    with pytest.raises(InputError, match="a change of learning_rate has the shape"):
        verify(run, outcome, hypergradient(run, outcome, "learning_rate", per_step=True))
