"""Meta-training of quadratics whose best inputs are known, resumed, stopped and audited."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograd import (
    FirstOrder,
    FixedPoint,
    MetaTraining,
    Outcome,
    Regression,
    Trajectory,
    audit,
    chain,
    hypergradient,
    meta_train,
    record,
)
from retrograd.errors import CorruptRecord, InputError, NonFinite
from retrograd.hypergradients.meta_training import OuterStep
from tests.cases import CASES, RULES, tabular

pytestmark = pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(*targets: float, steps: int = 1, start: float = 0.0, rate: float = 0.25, **options: Any) -> Trajectory:
    """Gradient descent on the mean of w_i (θ − y_i)², all examples in every batch: θ ← θ − 2 · rate · Σ w_i (θ − y_i) / n."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    data = (torch.ones(len(targets), 1, dtype=torch.float64), numbers(*targets)[:, None])
    decay, task = options.pop("weight_decay", 0.0), options.pop("task", Regression())
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=rate, weight_decay=decay)  # noqa: E731
    return record(model, data, task, optimizer=sgd, order=torch.arange(len(targets)).expand(steps, -1), **options)


def ends_at(target: float) -> Outcome:
    def miss(model: Any) -> Tensor:
        return (model.weight - target).square().sum()

    return Outcome(miss)


def descent(rate: float) -> Any:
    return lambda leaves: torch.optim.SGD(leaves, lr=rate)


def ended(run: Any) -> float:
    return run.final_state.params["weight"].item()


# ---------------------------------------------------------------------------------------------------------------------
# Optima that are known


@cache
def learned_rate() -> MetaTraining:
    return meta_train(quadratic(3.0), ends_at(2.0), "learning_rate", optimizer=descent(0.1), steps=20)  # θ = 6 · rate


def test_a_learning_rate_is_learned_on_a_logarithmic_scale():
    found = learned_rate()
    assert found.values["learning_rate"].exp().item() == pytest.approx(1 / 3, rel=1e-9)
    assert found.start["learning_rate"].exp().item() == pytest.approx(0.25)
    assert found.history[0] == OuterStep(0.25, None)
    assert ended(found.train()) == pytest.approx(2.0, rel=1e-9)
    assert found.best is None
    # its first change: −.1 · 2 (1.5 − 2) · 6 · rate
    once = meta_train(quadratic(3.0), ends_at(2.0), "learning_rate", optimizer=descent(0.1), steps=1)
    assert (once.values["learning_rate"] - once.start["learning_rate"]).item() == pytest.approx(0.15)


@pytest.mark.parametrize("method", [None, FixedPoint(window=1)])
def test_a_weight_decay_is_learned(method: Any):
    run = quadratic(3.0, steps=12, weight_decay=0.3)  # settles at 6 / (2 + decay)
    found = meta_train(run, ends_at(2.0), "weight_decay", optimizer=descent(1.0), steps=6, method=method)
    assert found.values["weight_decay"].exp().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("recorded", [None, (0.5, 2.0)])
def test_weights_of_examples_are_factors_on_the_recorded_ones(recorded: Any):
    own = numbers(*(recorded or (1.0, 1.0)))
    run = quadratic(1.0, 4.0, weights=None if recorded is None else own)
    slope = 0.25 * own * numbers(1.0, 4.0)  # θ = ⟨slope, factors⟩
    size = slope.square().sum()
    found = meta_train(run, ends_at(2.0), "example_weights", optimizer=descent(0.5 / size.item()), steps=2)
    nearest = 1 + slope * (2.0 - slope.sum()) / size  # of all that end at 2
    torch.testing.assert_close(found.values["example_weights"], nearest, rtol=1e-12, atol=0)
    assert ended(found.train()) == pytest.approx(2.0)


def test_the_start_is_learned():
    run = quadratic(3.0, steps=3)  # θ = 3 + (start − 3) / 8
    found = meta_train(run, ends_at(2.0), "initial_params", optimizer=descent(32.0), steps=2)
    assert found.values["initial_params/weight"].item() == pytest.approx(-5.0)


def test_labels_and_a_clipping_norm_are_learned():
    run = quadratic(3.0, clip_norm=2.0)  # the gradient is −6: θ = norm / 4
    found = meta_train(run, ends_at(1.0), "clip_norm", optimizer=descent(0.3), steps=20)
    assert found.values["clip_norm"].exp().item() == pytest.approx(4.0, rel=1e-5)
    assert ended(found.train()) == pytest.approx(1.0, rel=1e-6)
    learned = meta_train(quadratic(3.0), ends_at(1.0), "labels", optimizer=descent(2.0), steps=2)  # θ = label / 2
    assert learned.values["labels"].item() == pytest.approx(2.0)


class Target(nn.Module):
    """A number to be near to."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(numbers(value))


class Near:
    def losses(self, model: nn.Module, batch: Any, meta: Any) -> Tensor:
        return (model(batch[0]) - meta.module.value).square()[:, 0]

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]


def pursuit(value: float, **options: Any) -> Trajectory:
    """θ moves halfway to a number at each step."""
    return quadratic(0.0, task=Near(), meta=Target(value), **options)


@pytest.mark.parametrize(("stage", "optimum", "slope"), [(0, 4.0, 0.25), (1, 2.5, 0.5)])
def test_inputs_of_one_stage_of_a_chain_are_learned(stage: int, optimum: float, slope: float):
    first = pursuit(1.0)
    both = chain(first, pursuit(1.0, start=0.5))  # θ = value_0 / 4 + value_1 / 2
    target = 0.25 * (optimum if stage == 0 else 1.0) + 0.5 * (optimum if stage == 1 else 1.0)
    found = meta_train(both, ends_at(target), optimizer=descent(0.5 / slope**2), steps=2, stage=stage)
    assert found.meta.keys() == {"value"}
    assert found.meta["value"].item() == pytest.approx(optimum)
    assert ended(found.train()) == pytest.approx(target)
    assert ended(found.train(values=found.start)) == pytest.approx(0.75)


def test_every_stage_of_a_chain_goes_on_from_where_it_ended():
    both = chain(pursuit(1.0), pursuit(1.0, start=0.5))
    found = meta_train(both, ends_at(2.0), optimizer=descent(0.7), steps=4, start="warm", stage=0)
    value, first = 1.0, 0.0
    for step in found.history:
        first = (first + value) / 2
        second = (first + 1.0) / 2
        assert step.outcome == pytest.approx((second - 2.0) ** 2)
        value -= 0.7 * 2 * (second - 2.0) / 4
    assert found.meta["value"].item() == pytest.approx(value)
    assert ended(found.run) == pytest.approx(second)


# ---------------------------------------------------------------------------------------------------------------------
# Warm starts


@pytest.mark.parametrize("method", [None, FirstOrder()])
def test_alternating_steps_equal_the_loop_written_by_hand(method: Any):
    found = meta_train(pursuit(1.0), ends_at(2.0), optimizer=descent(0.4), steps=20, start="warm", method=method)
    theta, value = 0.0, 1.0
    for step in found.history:
        theta = (theta + value) / 2
        assert step.outcome == pytest.approx((theta - 2.0) ** 2, rel=1e-6, abs=1e-12)
        value -= 0.4 * 2 * (theta - 2.0) / 2
    assert found.meta["value"].item() == pytest.approx(value, rel=1e-7)
    assert ended(found.run) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("rule", ["adam", "adamw", "rmsprop momentum", "nesterov"])
def test_warm_starts_without_a_change_are_one_uninterrupted_run(rule: str):
    case, order = CASES["plain"], torch.randint(14, (4, 5), generator=torch.Generator().manual_seed(0))

    def trained(order: Tensor) -> Trajectory:
        model = case.model()
        optimizer = RULES[rule].optimizer(model.parameters(), **RULES[rule].options)
        return record(model, case.examples, case.task, optimizer=optimizer, order=order)

    found = meta_train(trained(order), case.queries, "learning_rate", optimizer=descent(0.0), steps=3, start="warm")
    whole = trained(order.repeat(3, 1)).final_state
    for name, leaf in found.run.final_state.params.items():
        torch.testing.assert_close(leaf, whole.params[name], rtol=1e-11, atol=1e-14)
    if rule.startswith("adam"):
        assert isinstance(found.run, Trajectory)
        assert [record.hyper[0]["step"] for record in found.run.records] == [9, 10, 11, 12]


# ---------------------------------------------------------------------------------------------------------------------
# What is beside the gradient


def test_a_penalty_is_added_to_the_outcome():
    slope, price = 0.25 * numbers(1.0, 4.0), 0.3
    found = meta_train(
        quadratic(1.0, 4.0),
        ends_at(2.0),
        "example_weights",
        optimizer=descent(0.6),
        steps=45,
        penalty=lambda values: price * (values["example_weights"] - 1).square().sum(),
    )
    ridge = torch.outer(slope, slope) + price * torch.eye(2, dtype=torch.float64)
    best = 1 + torch.linalg.solve(ridge, slope * (2.0 - slope.sum()))
    torch.testing.assert_close(found.values["example_weights"], best, rtol=1e-8, atol=0)
    assert found.history[0].outcome == pytest.approx((1.25 - 2.0) ** 2)  # without it


def test_the_best_by_validation_is_kept_and_patience_stops():
    """Outer steps lead θ from .5 to 2, past the 1.3 of the validation."""
    found = meta_train(pursuit(1.0), ends_at(2.0), optimizer=descent(0.2), steps=50, validation=ends_at(1.3), patience=2)
    value, ends, values = 1.0, [], []
    for _ in found.history:
        ends.append(value / 2)
        values.append(value)
        value -= 0.2 * 2 * (value / 2 - 2.0) / 2
    losses = [(end - 1.3) ** 2 for end in ends]
    assert [step.validation for step in found.history] == pytest.approx(losses)
    assert found.best is not None
    assert found.best == losses.index(min(losses)) > 0
    assert len(found.history) == found.best + 3
    assert found.meta["value"].item() == pytest.approx(values[found.best])
    assert ended(found.train()) == pytest.approx(ends[found.best])
    whole = meta_train(pursuit(1.0), ends_at(2.0), optimizer=descent(0.2), steps=20, validation=ends_at(1.3))
    assert (whole.best, len(whole.history)) == (found.best, 20)


def test_vary_says_what_else_differs():
    case, seen = CASES["dropout"], []
    run = case.record(RULES["sgd"])

    def vary(number: int) -> dict[str, Any]:
        seen.append(number)
        return {"seed": number, "order": orders[number]}

    generator = torch.Generator().manual_seed(0)
    orders = [[torch.randperm(14, generator=generator)[:4] for _ in range(len(run))] for _ in range(3)]
    found = meta_train(run, case.queries, "learning_rate", optimizer=descent(0.1), steps=3, vary=vary)
    assert seen == [0, 1, 2]
    again = run.rerun(seed=0, order=orders[0], hyper={"learning_rate": found.start["learning_rate"].exp()})
    assert found.history[0].outcome == pytest.approx(again.measurements(case.queries).mean().item(), rel=1e-12)
    expected = hypergradient(again, case.queries, "learning_rate")["learning_rate"][0] * 0.2
    once = meta_train(run, case.queries, "learning_rate", optimizer=descent(0.1), steps=1, vary=vary)
    moved = once.start["learning_rate"] - once.values["learning_rate"]
    torch.testing.assert_close(moved, 0.1 * expected, rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


class Killed(Exception):
    pass


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_an_interrupted_meta_training_goes_on_bit_for_bit(start: Any, tmp_path: Any):
    case = CASES["dropout"]
    run = case.record(RULES["adamw"])

    def trained(steps: int, folder: Any = None, kill_at: int | None = None) -> Any:
        def vary(number: int) -> dict[str, Any]:
            if number == kill_at:
                raise Killed
            return {"seed": number}

        return meta_train(
            run,
            case.queries,
            ("learning_rate", "example_weights"),
            optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.05, amsgrad=True),
            steps=steps,
            start=start,
            validation=tabular(6, 300),
            vary=vary,
            folder=folder,
        )

    whole = trained(6)
    with pytest.raises(Killed):
        trained(6, tmp_path, kill_at=2)
    trained(3, tmp_path)
    for found in (trained(6, tmp_path), trained(6, tmp_path)):  # the second has nothing left to do
        assert found.history == whole.history
        assert found.best == whole.best
        for name, leaf in whole.values.items():
            assert torch.equal(found.values[name], leaf), name
        assert found.run.final_state.equals(whole.run.final_state)
    assert len(trained(2, tmp_path).history) == 6


def test_a_state_that_was_altered_or_is_anothers_is_refused(tmp_path: Any):
    def trained(run: Trajectory, wrt: str = "meta", start: Any = "cold") -> Any:
        return meta_train(run, ends_at(2.0), wrt, optimizer=descent(0.2), steps=2, start=start, folder=tmp_path)

    trained(pursuit(1.0))
    with pytest.raises(InputError, match="another meta-training: \\['digests'\\]"):
        trained(pursuit(1.5))
    with pytest.raises(InputError, match="\\['names'\\]"):
        trained(pursuit(1.0), "learning_rate")
    with pytest.raises(InputError, match="\\['start'\\]"):
        trained(pursuit(1.0), start="warm")
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptRecord, match="was altered"):
        trained(pursuit(1.0))


# ---------------------------------------------------------------------------------------------------------------------
# What can't be asked


def infinite(model: Any) -> Tensor:
    return model.weight.sum() / 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "patience needs a validation outcome"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"stage": 1}, "stage below 1"),
        ({"wrt": "initial_params", "start": "warm"}, "does not begin at initial_params"),
        ({"wrt": "pixels"}, "did not go into this training"),
        ({"wrt": ()}, "did not go into this training"),
        ({"wrt": "weight_decay"}, "starts at 0.0; record with a small positive one"),
        ({"vary": lambda number: {"meta": {}}}, "leave it no say in \\['meta'\\]"),
        ({"start": "warm", "vary": lambda number: {"initial": None}}, "leave it no say in \\['initial'\\]"),
        ({"penalty": lambda values: values["meta/value"].sum() * float("inf")}, "non-finite at outer step 0, in meta/value"),
        ({"validation": Outcome(infinite)}, "the validation outcome is inf"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], message: str):
    own = {"wrt": "meta", "optimizer": descent(0.1), "steps": 2, **options}
    with pytest.raises((InputError, NonFinite), match=message):
        meta_train(pursuit(1.0), ends_at(2.0), own.pop("wrt"), **own)


def test_a_schedule_is_not_replaced_by_one_number():
    run = quadratic(3.0, steps=2, learning_rates=[0.25, 0.1])
    with pytest.raises(InputError, match="learning_rate of this run changes from step to step"):
        meta_train(run, ends_at(2.0), "learning_rate", optimizer=descent(0.1), steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Audits


def test_an_audit_tells_what_the_model_memorised():
    """Warm steps train the model; the weights of the examples hardly move."""
    run, goal = quadratic(2.0, 4.0, rate=0.04), ends_at(3.0)
    found = meta_train(run, goal, "example_weights", optimizer=descent(1e-3), steps=25, start="warm")
    told = audit(found, goal)
    assert [arm.name for arm in told.arms] == ["meta-trained", "retrained", "permuted", "unchanged"]
    assert told["meta-trained"].mean == pytest.approx((ended(found.run) - 3.0) ** 2)
    assert told["retrained"].mean == pytest.approx((ended(found.train()) - 3.0) ** 2)
    assert told["unchanged"].mean == pytest.approx(2.76**2)
    assert told.memorised > 7
    assert 0 < told.learned < 0.3
    assert "WARNING: the model memorised +" in str(told)
    assert "the variables learned +" in str(told)
    # Trained for as long as the model was, it is as good with the weights as it was.
    long = audit(found, goal, recipe=quadratic(2.0, 4.0, rate=0.04, steps=25))
    assert long["retrained"].mean == pytest.approx((ended(found.train(quadratic(2.0, 4.0, rate=0.04, steps=25))) - 3.0) ** 2)
    assert abs(long.memorised) < 0.1
    assert "memorised" not in str(long)


def test_an_audit_of_what_was_learned():
    run, goal = quadratic(1.0, 4.0), ends_at(2.0)
    found = meta_train(run, goal, "example_weights", optimizer=descent(0.3), steps=20)
    swap = lambda values, generator: {name: leaf.flip(0) for name, leaf in values.items()}  # noqa: E731
    told = audit(found, goal, permute=swap, alone=quadratic(2.0, steps=40))
    first, second = found.values["example_weights"].tolist()
    assert told["permuted"].mean == pytest.approx(((second + 4 * first) / 4 - 2.0) ** 2)
    assert told["unchanged"].mean == pytest.approx(0.75**2)
    assert told["outcome's data alone"].mean == pytest.approx(0.0, abs=1e-12)
    assert told.learned == pytest.approx(0.75**2)
    assert "memorised" not in str(told)
    assert "outcome's data alone does as well" in str(told)
    assert ("permuted variables do at least half as well" in str(told)) == (told["permuted"].mean < 0.75**2 / 2)
    worse = audit(found, goal, larger_is_better=True)
    assert worse.learned == pytest.approx(-told.learned)
    with pytest.raises(InputError, match="there is no arm 'alone'"):
        told["alone"]


def test_one_number_has_no_permutation():
    found = learned_rate()
    told = audit(found, ends_at(2.0))
    assert [arm.name for arm in told.arms] == ["meta-trained", "retrained", "unchanged"]
    assert "permuted" not in str(told)


def test_repeats_of_an_audit_differ_by_what_vary_says():
    case = CASES["dropout"]
    run = case.record(RULES["sgd"])
    found = meta_train(run, case.queries, "example_weights", optimizer=descent(0.1), steps=2)
    told = audit(found, tabular(6, 300), repeats=3, vary=lambda number: {"seed": number}, alone=run)
    for name, values in (("retrained", found.values), ("unchanged", found.start)):
        anew: list[Any] = [found.train(values=values, seed=number) for number in range(3)]
        ends = [one.measurements(tabular(6, 300)).mean().item() for one in anew]
        assert told[name].outcomes == pytest.approx(ends)
        assert told[name].error == pytest.approx(2 * torch.tensor(ends).std().item() / 3**0.5, rel=1e-5)
    assert len(told["outcome's data alone"].outcomes) == 3
    assert told["meta-trained"].error is None
    assert str(told).count("±") == 4
    assert audit(found, tabular(6, 300), seed=1)["permuted"] == audit(found, tabular(6, 300), seed=1)["permuted"]
    with pytest.raises(InputError, match="repeats differ only by what vary="):
        audit(found, case.queries, repeats=2)


def test_training_anew_takes_other_values_recipes_and_changes():
    found = learned_rate()
    assert ended(found.train(quadratic(3.0, steps=2))) == pytest.approx(3 * (1 - (1 - 2 / 3) ** 2))
    assert ended(found.train(values=found.start)) == pytest.approx(1.5)
    start = quadratic(3.0, start=1.5).state(0)
    assert ended(found.train(initial=start)) == pytest.approx(2.5)
