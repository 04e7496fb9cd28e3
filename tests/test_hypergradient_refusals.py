"""What hypergradients refuse: what is not finite, and inputs that there are none of; and what a result says of itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograd import FirstOrder, FixedPoint, Forward, Hypergradient, Queries, Trajectory, Unrolled, hypergradient, record
from retrograd.errors import InputError, NonFinite
from tests.cases import CASES, RULES, normal
from tests.test_hypergradients import queries_of, run_of


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


class _Rooted(nn.Module):
    """√ of a meta-parameter: at 0 its derivative is infinite, and nothing else is."""

    def __init__(self, start: float):
        super().__init__()
        self.depth = nn.Parameter(torch.tensor(start, dtype=torch.float64))


class _WithRoot:
    def losses(self, model: nn.Module, batch: Any, meta: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs)[:, 0] * (1 + meta.module.depth.sqrt()) - targets[:, 0].abs().sqrt()).square()

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]


def rooted(depth: float, target: float) -> Trajectory:
    model = nn.Linear(3, 1).double()
    model.load_state_dict({"weight": normal(1, 3, seed=3), "bias": normal(1, seed=4)})
    data = (normal(4, 3, seed=1), torch.tensor([[1.0], [2.0], [target], [1.0]], dtype=torch.float64))
    order = torch.tensor([[0, 1], [2, 3], [0, 3]])
    return record(model, data, _WithRoot(), optimizer=_sgd, order=order, meta=_Rooted(depth))


def test_an_infinite_derivative_is_refused_with_the_step_and_the_name():
    asked = (normal(2, 3, seed=5), torch.zeros(2, 1))
    with pytest.raises(NonFinite, match=r"step 2, in meta/depth"):
        hypergradient(rooted(0.0, 1.0), Queries(asked), "meta")
    with pytest.raises(NonFinite, match=r"step 1, in labels"):
        hypergradient(rooted(0.5, 0.0), Queries(asked), ("labels", "example_weights"))
    with pytest.raises(NonFinite, match=r"step 0, in params/"):
        hypergradient(rooted(0.0, 1.0), Queries(asked), "meta", method=Forward())
    with pytest.raises(NonFinite, match=r"step 2, in meta/depth"):
        hypergradient(rooted(0.0, 1.0), Queries(asked), "meta", method=FixedPoint(window=1, solver="identity"))
    # What was not asked for is not looked at, and the rest is as it should be.
    assert hypergradient(rooted(0.5, 0.0), Queries(asked), "meta").vector().isfinite().all()


class _Kinked:
    """|θ|^1.5 has no second derivative at θ = 0."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1][:, 0]).square() + model.weight.abs().pow(1.5).sum()

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]


def test_a_derivative_by_the_start_that_is_not_finite_is_refused_too():
    model = nn.Linear(3, 1).double()
    model.load_state_dict({"weight": torch.tensor([[0.5, 0.0, -0.2]]), "bias": normal(1, seed=4)})
    data = (normal(4, 3, seed=1), normal(4, 1, seed=2))
    run = record(model, data, _Kinked(), optimizer=_sgd, epochs=1, batch_size=2)
    with pytest.raises(NonFinite, match=r"step 0, in .*params/weight"):
        hypergradient(run, Queries(data), "initial_params")


def test_an_outcome_that_is_not_finite_is_refused():
    run = run_of("plain", "sgd")
    with pytest.raises(NonFinite, match="the outcome is"):
        hypergradient(run, lambda model: torch.log(-model[0].weight.square().sum()), "learning_rate")


# ---------------------------------------------------------------------------------------------------------------------
# What can't be asked


@pytest.mark.parametrize(
    ("setup", "rule", "wrt", "options", "message"),
    [
        ("plain", "sgd", "learning_rates", {}, "did not go into this training"),
        ("plain", "sgd", (), {}, "names no input"),
        ("plain", "sgd", "momentum", {}, "train with momentum above 0"),
        ("plain", "sgd", "meta", {}, "record with meta=module"),
        ("plain", "sgd", "clip_norm", {}, "did not go into"),
        ("plain", "sgd", "beta1", {}, "did not go into"),
        ("plain", "sgd", "step", {}, "did not go into"),
        ("plain", "adam", "step", {}, "did not go into"),
        ("plain", "sgd", "pixels", {}, "inputs"),
        ("plain", "sgd", "learning_rate", {"method": Forward(), "per_step": True}, "same in every step"),
        ("plain", "sgd", "example_weights", {"method": Forward()}, "few numbers"),
        ("plain", "sgd", "initial_params", {"method": Forward()}, "few numbers"),
        ("plain", "sgd", "initial_params", {"method": Unrolled(last=3)}, "say nothing of the start"),
        ("plain", "sgd", "initial_params", {"method": FirstOrder(last=3)}, "forgets where training began"),
        ("plain", "sgd", "initial_params", {"method": FixedPoint()}, "forgets where training began"),
        ("plain", "sgd", "learning_rate", {"method": [Unrolled()]}, "stages of a chain"),
        ("everything", "adamw", "inputs", {"method": Forward()}, "few numbers"),
    ],
)
def test_what_cannot_be_given_is_refused(setup: str, rule: str, wrt: Any, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        hypergradient(run_of(setup, rule), queries_of(setup), wrt, **options)


def test_integers_that_stand_for_no_classes_are_refused():
    case = CASES["tied"]
    run = case.record(RULES["sgd"])
    with pytest.raises(InputError, match="inputs of this run are integers"):
        hypergradient(run, Queries(case.queries), "inputs")
    assert hypergradient(run, Queries(case.queries), "labels")["labels"].shape == (4, 14, 5)


def test_forward_mode_is_for_few_numbers():
    class Many(nn.Module):
        def __init__(self, count: int):
            super().__init__()
            self.table = nn.Parameter(torch.ones(count, dtype=torch.float64))

    class Task:
        def losses(self, model: nn.Module, batch: Any, meta: Any) -> Tensor:
            return (model(batch[0]) - batch[1]).square().mean(1) * meta.module.table.mean()

        def measurements(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).sum(1)

    data = (normal(4, 3, seed=1), normal(4, 1, seed=2))
    for count, allowed in ((63, True), (64, False)):
        run = record(nn.Linear(3, 1).double(), data, Task(), optimizer=_sgd, epochs=1, batch_size=2, meta=Many(count))
        assert hypergradient(run, Queries(data), ("meta", "learning_rate"))["meta"]["table"].shape == (4, count)
        if allowed:
            assert hypergradient(run, Queries(data), ("meta", "learning_rate"), method=Forward()).notes["tangents"] == 64
        else:
            with pytest.raises(InputError, match=r"65 numbers are asked for \(at most 64\)"):
                hypergradient(run, Queries(data), ("meta", "learning_rate"), method=Forward())


def test_momentum_of_a_group_that_keeps_no_velocity_is_refused():
    """Groups with and without may be mixed. Where torch keeps no velocity, the derivative is not 0 but unknown."""
    case = CASES["plain"]
    model = case.model()
    names = [name for name, _ in model.named_parameters()]
    groups = [{"params": [model.get_parameter(name) for name in own]} for own in (names[:2], names[2:])]
    optimizer = torch.optim.SGD([{**groups[0], "momentum": 0.5}, {**groups[1], "momentum": 0.0}], lr=0.2)
    run = record(model, case.examples, case.task, optimizer=optimizer, epochs=1, batch_size=4)
    for method in (Unrolled(), Forward()):
        with pytest.raises(InputError, match="momentum above 0"):
            hypergradient(run, Queries(CASES["plain"].queries), "momentum", method=method)
    assert hypergradient(run, Queries(CASES["plain"].queries), "learning_rate")["learning_rate"].all()


# ---------------------------------------------------------------------------------------------------------------------
# What a result says of itself


def made(**notes: Any) -> Hypergradient:
    values = {
        "learning_rate": torch.tensor([[2.0, 3.0], [0.5, -1.0]]),
        "meta": {"scale": torch.tensor([4.0, 1.0]), "shift": torch.tensor([[1.0, 0.0], [0.0, 5.0]])},
    }
    return Hypergradient(values, torch.tensor([7.0, 8.0]), "by hand", notes)


def test_along_is_the_inner_product_with_a_change():
    direction = {"learning_rate": torch.tensor([0.1, 0.01])}
    assert made().along(direction).tolist() == pytest.approx([0.23, 0.04])
    meta = {"scale": torch.tensor(2.0), "shift": torch.tensor([10.0, 20.0])}
    assert made().along({**direction, "meta": meta}).tolist() == pytest.approx([18.23, 102.04])
    with pytest.raises(InputError, match=r"no derivative by 'momentum' here. There is: \['learning_rate', 'meta'\]"):
        made().along({"momentum": torch.tensor([1.0])})
    with pytest.raises(InputError, match="shape"):
        made().along({"learning_rate": torch.tensor([0.1])})
    with pytest.raises(InputError, match="shift"):
        made().along({"meta": {"scale": torch.tensor(2.0)}})


def test_vector_and_cosine():
    assert made().vector().tolist() == [[2, 3, 4, 1, 0], [0.5, -1, 1, 0, 5]]
    assert made().vector("meta").tolist() == [[4, 1, 0], [1, 0, 5]]
    assert made().vector("meta", "learning_rate")[0].tolist() == [4, 1, 0, 2, 3]
    other = made()
    other.values["learning_rate"] = torch.tensor([[3.0, -2.0], [1.0, -2.0]])
    assert made().cosine(other, "learning_rate").tolist() == pytest.approx([0.0, 1.0])
    assert made().cosine(made()).tolist() == pytest.approx([1.0, 1.0])


def test_vectors_of_two_methods_have_the_same_order():
    """Whatever the order in which a method found its derivatives."""
    run = run_of("everything", "nesterov")
    names = ("learning_rate", "momentum", "weight_decay", "clip_norm", "meta")
    ways = (("unrolled", Unrolled()), ("forward", Forward()))
    found = {way: hypergradient(run, queries_of("everything"), names, method=method) for way, method in ways}
    assert found["unrolled"].cosine(found["forward"]).min() > 1 - 1e-9


def test_doubts_are_what_the_notes_say():
    assert made(exact=True).doubts == ()
    assert made(drift=0.05, solver_residual=0.05).doubts == ()
    (truncated,) = made(steps=3, of_steps=10).doubts
    assert "last 3 of 10 steps" in truncated
    unsettled, unsolved = made(drift=0.5, solver_residual=0.25).doubts
    assert "0.5 of its way" in unsettled
    assert "25% of the right-hand side" in unsolved
