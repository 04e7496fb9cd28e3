"""Implicit differentiation of the update map: against unrolling of converged runs, dense Jacobians, and its own formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograd import FixedPoint, Queries, Regression, Trajectory, Unrolled, attribute, hypergradient, record
from retrograd.errors import InputError, NotRecorded, SolverFailed, UntrustedGradient
from tests.cases import CASES, RULES, WEIGHTS, Case, Rule, linear, normal
from tests.reference import fixed_point as dense
from tests.setups import SETUPS, Commentary, Commented, Setup, commented_alike, normalised
from tests.tolerances import TOLERANCES

OWN = TOLERANCES["approximate_vs_own_formula"]


def logistic() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


def logistic_formula(params, buffers, inputs, draw):
    return linear(params, "0", inputs), buffers


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3, momentum=0.3, affine=False), nn.Linear(3, 3))


def normed_formula(params, buffers, inputs, draw):
    plain = {"2.weight": torch.ones(3), "2.bias": torch.zeros(3)}
    hidden, buffers = normalised(torch.tanh(linear(params, "0", inputs)), plain, buffers, "2", draw is not None)
    return linear(params, "3", hidden), buffers


_LOGISTIC = Case(logistic, logistic_formula, weights=WEIGHTS)
# What the statistics normalise would shrink without end, so the first weights are kept: only biases move the statistics.
_NORMED = Case(normed, normed_formula, weights=WEIGHTS, frozen=("0.weight",))
CONVERGED = {
    "logistic": Setup(_LOGISTIC, epochs=80, batch=14),
    "meta": Setup(_LOGISTIC, commented_alike, Commented(still=True), Commentary, soft_labels=True, epochs=80, batch=14),
    "batchnorm": Setup(_NORMED, epochs=110, batch=14),
}
SETTLING = {
    "sgd": Rule(torch.optim.SGD, {"lr": 1.0, "weight_decay": 0.3}),
    "momentum": Rule(torch.optim.SGD, {"lr": 0.7, "weight_decay": 0.3, "momentum": 0.4}),
    "nesterov": Rule(torch.optim.SGD, {"lr": 0.7, "weight_decay": 0.3, "momentum": 0.4, "nesterov": True}),
    "adam": Rule(torch.optim.Adam, {"lr": 0.15, "weight_decay": 0.3, "betas": (0.5, 0.7), "eps": 0.2}),
    "adamw": Rule(torch.optim.AdamW, {"lr": 0.2, "weight_decay": 1.0, "betas": (0.5, 0.7), "eps": 0.2}),
    "rmsprop": Rule(torch.optim.RMSprop, {"lr": 0.1, "weight_decay": 0.3, "alpha": 0.7, "eps": 0.2, "momentum": 0.4}),
}
PAIRS = [("logistic", rule) for rule in SETTLING] + [("meta", "adamw"), ("batchnorm", "momentum"), ("batchnorm", "adamw")]
_RUNS: dict[tuple[str, str], Trajectory] = {}


def run_of(setup: str, rule: str) -> Trajectory:
    if (setup, rule) not in _RUNS:
        _RUNS[setup, rule] = CONVERGED[setup].record(SETTLING[rule])
    return _RUNS[setup, rule]


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry; NaN counts as infinitely far."""
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def flat(value: Any) -> Tensor:
    leaves = [value[name] for name in sorted(value)] if isinstance(value, dict) else [value]
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Converged runs


@pytest.mark.parametrize(("setup", "rule"), PAIRS, ids=map("-".join, PAIRS))
def test_converged_runs_follow_their_inputs_as_the_fixed_point_does(setup: str, rule: str):
    run = run_of(setup, rule)
    queries = Queries(CONVERGED[setup].case.queries)
    names = {"example_weights", "weight_decay", "inputs", "labels"} | ({"meta"} if CONVERGED[setup].meta else set())
    unrolled = hypergradient(run, queries, names, method=Unrolled(route="batched"))
    found = hypergradient(run, queries, names, method=FixedPoint(tolerance=1e-12))
    expected = dense.hypergradients(CONVERGED[setup], SETTLING[rule], run, range(len(run) - 1, len(run)))
    expected["weight_decay"] = expected["weight_decay"].sum(1)
    for name in names:
        assert distance(flat(found[name]), flat(expected[name])) < OWN, name
        assert distance(flat(found[name]), flat(unrolled[name])) < 1e-6, name
    assert found.notes["drift"] < 1e-5
    assert found.notes["solver_residual"] < 1e-11
    assert found.notes["exact"] is False
    assert found.doubts == ()


def test_what_adamw_settles_at_is_no_minimum_of_the_loss():
    """The textbook's −H⁻¹ of the loss alone is wrong by much; that of the update map is right."""
    run, case = run_of("logistic", "adamw"), CONVERGED["logistic"].case
    queries = Queries(case.queries)
    unrolled = hypergradient(run, queries, "example_weights", method=Unrolled(route="batched"))["example_weights"]
    found = hypergradient(run, queries, "example_weights", method=FixedPoint())["example_weights"]
    params, (inputs, targets) = run.final_state.params, case.examples
    names = list(params)

    def losses(vector: Tensor) -> Tensor:
        parts = vector.split([params[name].numel() for name in names])
        own = {name: part.view_as(params[name]) for name, part in zip(names, parts, strict=True)}
        outputs = linear(own, "0", inputs)
        return torch.log(torch.exp(outputs).sum(1)) - outputs[torch.arange(len(targets)), targets]

    here = torch.cat([params[name].flatten() for name in names])
    total = torch.func.hessian(lambda vector: (WEIGHTS * losses(vector)).mean())(here)
    asked = torch.cat([leaf.flatten(1) for leaf in queries.gradients(run, run.final_state).params.values()], 1)
    textbook = -asked @ torch.linalg.pinv(total, rtol=1e-9) @ torch.func.jacrev(losses)(here).T / len(targets)
    assert distance(found, unrolled) < 1e-6
    assert distance(textbook, unrolled) > 0.3


def test_scores_of_a_converged_run():
    run = run_of("logistic", "adam")
    queries = CONVERGED["logistic"].case.queries
    scores = attribute(run, queries, method=FixedPoint(), check_roughness=False)
    expected = hypergradient(run, Queries(queries), "example_weights", method=FixedPoint())["example_weights"]
    assert distance(scores.values, expected) < 1e-12
    assert scores.notes["exact"] is False
    assert scores.notes["solver"] == "conjugate_gradients"


# ---------------------------------------------------------------------------------------------------------------------
# The mean of several steps, wherever the run is


@pytest.mark.parametrize(
    ("setup", "rule", "window"),
    [("logistic", "momentum", 4), ("logistic", "nesterov", 3), ("meta", "sgd", 1), ("batchnorm", "momentum", 4)],
)
@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
def test_a_window_is_the_mean_map_of_its_steps(setup: str, rule: str, window: int):
    own = replace(CONVERGED[setup], epochs=3, batch=4)
    run = own.record(SETTLING[rule])
    steps = range(len(run) - window, len(run))
    names = {"example_weights", "inputs", "labels", "weight_decay"} | ({"meta"} if own.meta else set())
    found = hypergradient(run, Queries(own.case.queries), names, method=FixedPoint(window=window, tolerance=1e-13))
    expected = dense.hypergradients(own, SETTLING[rule], run, steps)
    expected["weight_decay"] = expected["weight_decay"].sum(1)
    for name in names:
        assert distance(flat(found[name]), flat(expected[name])) < OWN, name
    seen = torch.cat([run.records[step].example_ids for step in steps])
    unseen = [row for row in range(14) if row not in seen]
    assert not found["example_weights"][:, unseen].any()
    assert found["example_weights"][:, seen].all()


def test_the_window_goes_through_the_data_once_where_nothing_else_is_said():
    """Also with a batch at the end of each epoch that is not full."""
    run = SETUPS["plain"].record(RULES["sgd decay"])
    queries = Queries(SETUPS["plain"].case.queries)
    options: Any = {"solver": "identity"}
    with pytest.warns(UntrustedGradient):
        found = hypergradient(run, queries, "example_weights", method=FixedPoint(**options))["example_weights"]
    with pytest.warns(UntrustedGradient):
        four = hypergradient(run, queries, "example_weights", method=FixedPoint(**options, window=4))["example_weights"]
    assert torch.equal(found, four)


# ---------------------------------------------------------------------------------------------------------------------
# Solvers by their formulas


def quadratic(steps: int, start: float, **options: Any) -> Trajectory:
    model = nn.Linear(3, 1).double()
    model.load_state_dict({"weight": start * normal(1, 3, seed=3), "bias": start * normal(1, seed=4)})
    data = (normal(6, 3, seed=1), normal(6, 1, seed=2))
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})
    return record(model, data, Regression("prediction"), optimizer=optimizer, order=torch.arange(6).repeat(steps, 1))


def matrices(run: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
    """H of the mean loss, the gradients of the queries, and those of the examples, parameters as (weight, bias)."""
    inputs, targets = run.examples.data
    ones = torch.ones(6, 1, dtype=torch.float64)
    features, queries = torch.cat([inputs, ones], 1), torch.cat([normal(2, 3, seed=5), ones[:2]], 1)
    theta = torch.cat([run.final_state.params["weight"][0], run.final_state.params["bias"]])
    return 2 * features.T @ features / 6, queries, 2 * (features @ theta - targets[:, 0])[:, None] * features


def asked() -> Queries:
    return Queries((normal(2, 3, seed=5), torch.zeros(2, 1, dtype=torch.float64)))


@pytest.mark.parametrize("start", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("terms", [1, 7, 30])
@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
def test_a_neumann_series_is_that_many_steps_of_training_from_any_start(start: float, terms: int):
    """On a quadratic, for inputs whose mixed derivative is the same everywhere: the labels."""
    run = quadratic(terms, start)
    unrolled = hypergradient(run, asked(), "labels", method=Unrolled(route="batched"))["labels"]
    found = hypergradient(run, asked(), "labels", method=FixedPoint("neumann", terms, window=1))["labels"]
    assert distance(found, unrolled) < 1e-12
    H, q, _ = matrices(run)
    series = sum(torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - 0.1 * H, power) for power in range(terms)) * 0.1
    features = torch.cat([run.examples.data[0], torch.ones(6, 1, dtype=torch.float64)], 1)
    assert distance(found[..., 0], q @ series @ (2 * features.T / 6)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.3}], ids=["plain", "momentum"])
@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
def test_solvers_equal_their_formulas(options: dict):
    run = quadratic(5, 1.0, **options)
    H, q, per_example = matrices(run)
    H = H + options.get("weight_decay", 0.0) * torch.eye(4, dtype=torch.float64)
    S = 0.1 / (1 - options.get("momentum", 0.0))

    def scores(method: FixedPoint) -> Tensor:
        return hypergradient(run, asked(), "example_weights", method=method)["example_weights"]

    def formula(inverse: Tensor) -> Tensor:
        return -q @ inverse @ per_example.T / 6

    one = torch.eye(4, dtype=torch.float64)
    assert distance(scores(FixedPoint(tolerance=1e-12)), formula(torch.linalg.inv(H))) < OWN
    for shift in (0.05, 2.0):
        shifted = formula(torch.linalg.inv(H + shift * one))
        assert distance(scores(FixedPoint(shift=shift, tolerance=1e-12)), shifted) < OWN
        for rank in (4, 50):  # the whole of it
            assert distance(scores(FixedPoint("nystrom", shift=shift, rank=rank)), shifted) < OWN
    assert distance(scores(FixedPoint("nystrom", shift=0.05, rank=2)), formula(torch.linalg.inv(H + 0.05 * one))) > 1e-3
    assert distance(scores(FixedPoint("identity")), formula(S * one)) < OWN
    for terms, step in ((1, 1.0), (5, 1.0), (12, 0.5)):
        series = sum((torch.linalg.matrix_power(one - step * S * H, power) for power in range(terms)), 0 * one) * step * S
        assert distance(scores(FixedPoint("neumann", terms, step=step)), formula(series)) < OWN
        shifted = H + 0.5 * one
        series = sum((torch.linalg.matrix_power(one - step * S * shifted, power) for power in range(terms)), 0 * one) * step * S
        assert distance(scores(FixedPoint("neumann", terms, step=step, shift=0.5)), formula(series)) < OWN
        series = sum((torch.linalg.matrix_power(one - 0.1 * step * H, power) for power in range(terms)), 0 * one) * 0.1 * step
        assert distance(scores(FixedPoint("neumann", terms, step=0.1 * step, preconditioned=False)), formula(series)) < OWN


def test_a_neumann_series_preconditioned_by_adam_ends_at_the_solution():
    """With Adam: the series ends where conjugate gradients do, and not at all with too large a step."""
    run, own = run_of("logistic", "adam"), CONVERGED["logistic"]
    queries = Queries(own.case.queries)
    series = hypergradient(run, queries, "labels", method=FixedPoint("neumann", 500, step=0.5))
    exact = hypergradient(run, queries, "labels", method=FixedPoint(tolerance=1e-12))
    assert distance(series["labels"], exact["labels"]) < 1e-6
    with pytest.raises(SolverFailed, match="diverges"):
        hypergradient(run, queries, "labels", method=FixedPoint("neumann", 500, step=50.0))


# ---------------------------------------------------------------------------------------------------------------------
# What is no fixed point, and what does not move one


def test_a_run_that_has_not_settled_is_doubted():
    run = quadratic(3, 1.0)
    with pytest.warns(UntrustedGradient, match="has not settled"):
        found = hypergradient(run, asked(), "labels", method=FixedPoint())
    assert found.notes["drift"] > 0.1
    H, _, per_example = matrices(run)
    state, start = run.final_state.params, run.state(0).params
    came = torch.cat([(state[name] - start[name]).flatten() for name in state]).norm()
    assert found.notes["drift"] == pytest.approx((3 * 0.1 * per_example.mean(0).norm() / came).item(), rel=1e-9)
    assert torch.linalg.eigvalsh(H).min() > 0
    with pytest.warns(UntrustedGradient, match="of the right-hand side unsolved"):
        hypergradient(run_of("logistic", "sgd"), Queries(_LOGISTIC.queries), "labels", method=FixedPoint(iterations=1))


@pytest.mark.parametrize(
    ("rule", "wrt"),
    [("sgd", "learning_rate"), ("momentum", "momentum"), ("adam", "beta1"), ("adamw", ("meta_rate", "epsilon"))],
)
def test_inputs_that_do_not_move_a_fixed_point_are_refused(rule: str, wrt: Any):
    message = "did not go into" if "meta_rate" in wrt else "do not move the fixed point"
    with pytest.raises(InputError, match=message):
        hypergradient(run_of("logistic", rule), Queries(_LOGISTIC.queries), wrt, method=FixedPoint())


def test_clipping_that_is_still_active_is_refused():
    run = CASES["clipped"].record(RULES["sgd"])
    tight = run.rerun(clip_norm=0.01)
    with pytest.raises(InputError, match="clipping is still active"):
        hypergradient(tight, Queries(CASES["clipped"].queries), "example_weights", method=FixedPoint())
    with pytest.raises(InputError, match="do not move the fixed point"):
        hypergradient(run, Queries(CASES["clipped"].queries), "clip_norm", method=FixedPoint())


def test_slots_that_never_forget_are_refused():
    run = quadratic(4, 1.0, momentum=1.0, lr=0.01)
    with pytest.raises(SolverFailed, match="never forgets"):
        hypergradient(run, asked(), "labels", method=FixedPoint())


class _Counting(nn.Module):
    """Its buffer sums up instead of averaging."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if self.training:
            self.total += hidden.detach().mean(0)
        return self.last(hidden + 0.01 * self.total)


def test_buffers_that_are_no_running_averages_are_refused():
    model = _Counting().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = (normal(6, 3, seed=1), normal(6, 1, seed=2))
    run = record(model, data, Regression("prediction"), optimizer=optimizer, epochs=3, batch_size=6)
    with pytest.raises(SolverFailed, match="buffer total is no running average"):
        hypergradient(run, asked(), "labels", method=FixedPoint(shift=5.0))


def test_an_indefinite_curvature_is_said_so():
    """Far from a minimum of a network."""
    own = SETUPS["plain"]
    run = own.record(RULES["sgd"])
    A = dense.jacobian(own, RULES["sgd"], run, range(4, 8))
    assert torch.linalg.eigvalsh(torch.eye(len(A), dtype=A.dtype) - A).min() < 0
    with pytest.raises(SolverFailed, match="positive definite"):
        hypergradient(run, Queries(own.case.queries), "example_weights", method=FixedPoint(window=4))


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"tolerance": 0.0},
        {"step": 0.0},
        {"rank": 0},
        {"shift": -0.1},
        {"window": 0},
        {"solver": "nystrom"},
    ],
)
def test_options_out_of_range_are_refused(options: dict):
    with pytest.raises(InputError):
        FixedPoint(**options)


def test_a_run_without_steps_is_refused():
    model = logistic().double()
    run = record(model, _LOGISTIC.examples, _LOGISTIC.task, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), order=[])
    with pytest.raises(NotRecorded, match="recorded steps"):
        hypergradient(run, Queries(_LOGISTIC.queries), "example_weights", method=FixedPoint())
