"""Unrolling with Gauss-Newton matrices against autograd through a run whose model is linearised at each step, and against dense
matrices."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Regression, Trajectory, Unrolled, attribute, record
from retrograd.adjoint import unrolled as unrolled_module
from retrograd.errors import InputError, NonFinite, NoSecondDerivative
from retrograd.task import SplitTask, check_split, split_task
from retrograd.trajectory import Roughness, StateVectors
from tests.cases import CASES, EXAMPLES, RULES, WEIGHTS, Case, labels, normal
from tests.reference import unrolled_autograd as reference
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["exact_vs_autograd"]
ROUTES = ("batched", "loop")
KINDS = ("momentum", "nesterov", "adamw")
PAIRS = [(rule, case) for case in CASES for rule in (RULES if case == "clipped" else KINDS)]


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return difference if difference == difference else float("inf")


def scores(run: Trajectory, queries: object, route: str = "batched", query_batch: int | None = None, **options) -> Tensor:
    method = Unrolled(**{"route": route, "curvature": "gauss_newton", **options})
    return attribute(run, queries, method=method, query_batch=query_batch, check_roughness=False).values


# ---------------------------------------------------------------------------------------------------------------------
# Against its own formula


@pytest.mark.parametrize(("rule", "case"), PAIRS, ids=map("-".join, PAIRS))
def test_scores_equal_autograd_through_the_run_with_the_model_linearised(rule: str, case: str):
    run = CASES[case].record(RULES[rule])
    expected = reference.scores(CASES[case], RULES[rule], run, gauss_newton=True)
    for route in ROUTES:
        assert distance(scores(run, CASES[case].queries, route), expected) < EXACT
    exact = scores(run, CASES[case].queries, curvature="hessian")
    assert distance(exact, expected) > 1e-4  # the two methods are not the same


@pytest.mark.parametrize("name", ["clipped", "batchnorm", "dropout"])
def test_last_equals_autograd_with_the_first_steps_detached(name: str):
    case, rule = CASES[name], RULES["nesterov"]
    run = case.record(rule)
    expected = reference.scores(case, rule, run, last=3, gauss_newton=True)
    assert distance(scores(run, case.queries, last=3), expected) < EXACT
    assert distance(scores(run, case.queries, rank=4), reference.scores(case, rule, run, gauss_newton=True)) < EXACT


def dense_scores(run: Trajectory, queries: tuple) -> Tensor:
    """Plain SGD, step by step: λ ← (I − η Jᵀ H J) λ with dense J and H, and −η ⟨λ, ∇ℓ_i⟩ / B."""
    task, model, names = run.update_map.task, run.update_map.model, list(run.final_state.params)

    def call(function, params: dict, batch: tuple) -> Tensor:
        class Caller(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return function(self.model, batch)

        return torch.func.functional_call(Caller(), {f"model.{name}": leaf for name, leaf in params.items()}, ())

    def jacobian(function, state, batch: tuple) -> Tensor:
        found = torch.func.jacrev(lambda params: call(function, params, batch).flatten())(state.params)
        return torch.cat([found[name].flatten(1) for name in names], 1)

    costates = jacobian(task.measurements, run.final_state, queries)
    total = torch.zeros(len(costates), len(run.examples), dtype=torch.float64)
    for step in reversed(range(len(run))):
        state, entry = run.state(step), run.records[step]
        batch, rate, size = run.examples.batch(entry.example_ids), entry.hyper[0]["learning_rate"], len(entry.example_ids)
        weights = torch.ones(size, dtype=torch.float64) if entry.weights is None else entry.weights
        total[:, entry.example_ids] -= rate * costates @ jacobian(task.losses, state, batch).T / size
        J, outputs = jacobian(task.outputs, state, batch), call(task.outputs, state.params, batch)

        def loss(flat: Tensor, outputs=outputs, batch=batch, weights=weights) -> Tensor:
            return (weights * task.losses_of(flat.view_as(outputs), batch)).sum() / len(weights)

        H = torch.func.hessian(loss)(outputs.detach().flatten())
        costates = costates - rate * costates @ (J.T @ H @ J)
    return total


class NextToken:
    """A user's own task on sequences: outputs are [batch, position, token]."""

    def outputs(self, model, batch):
        return model(batch[0][:, :-1])

    def losses_of(self, outputs, batch):
        return F.cross_entropy(outputs.mT, batch[0][:, 1:], reduction="none").mean(1)

    def losses(self, model, batch):
        return self.losses_of(self.outputs(model, batch), batch)

    measurements = losses


def language_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def small_mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def train(model: nn.Module, data: tuple, task, **options) -> Trajectory:
    weights = options.pop("weights", WEIGHTS)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.3, **options})
    return record(model, data, task, optimizer=optimizer, epochs=2, batch_size=4, weights=weights, seed=3)


TASKS = {
    "sequences": (language_model, NextToken(), lambda n, seed: (labels(4 * n, 5, seed).view(n, 4),)),
    "classes": (small_mlp, Classification(), CASES["plain"].data),
    "smoothed": (small_mlp, Classification("loss", label_smoothing=0.2), CASES["plain"].data),
    "components": (small_mlp, Regression("prediction"), lambda n, seed: (normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1))),
}


@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["weights", "ones"])
@pytest.mark.parametrize("name", TASKS)
def test_scores_equal_dense_matrices(name: str, weights: Tensor | None):
    build, task, data = TASKS[name]
    run, queries = train(build(), data(EXAMPLES, 1), task, weights=weights), data(3, 50)
    for route in ROUTES:
        assert distance(scores(run, queries, route), dense_scores(run, queries)) < EXACT


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_model_with_squared_error_has_no_other_hessian(rule: str):
    def linear() -> nn.Module:
        return nn.Linear(3, 2)

    data = lambda n, seed: (normal(n, 3, seed=seed), normal(n, 2, seed=seed + 1))  # noqa: E731
    case = Case(linear, None, data, Regression("prediction"), weights=WEIGHTS, clip_norm=0.5)  # type: ignore[arg-type]
    run = case.record(RULES[rule])
    for route in ROUTES:
        assert distance(scores(run, case.queries, route), scores(run, case.queries, route, curvature="hessian")) < EXACT


def test_losses_that_are_linear_in_the_outputs_leave_costates_as_they_are():
    @dataclass(frozen=True)
    class Linear(Regression):
        def losses_of(self, outputs, batch):
            return (outputs * batch[1]).sum(1)

    data = (normal(EXAMPLES, 3, seed=1), normal(EXAMPLES, 3, seed=2))
    run = train(small_mlp(), data, Linear("prediction"), lr=0.01)
    for route in ROUTES:
        assert distance(scores(run, (data[0][:3], data[1][:3]), route), dense_scores(run, (data[0][:3], data[1][:3]))) < EXACT


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize("query_batch", [1, 3, 9])
def test_scores_do_not_depend_on_route_and_query_slicing(query_batch: int):
    case = CASES["batchnorm"]
    run = case.record(RULES["adam"])
    expected = scores(run, case.queries)
    for route in (*ROUTES, "auto"):
        assert distance(scores(run, case.queries, route, query_batch), expected) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["batchnorm", "groups"])
def test_slices_of_costates_make_no_difference(monkeypatch, name: str, route: str):
    case = CASES[name]
    run = case.record(RULES["adam"])
    expected = scores(run, case.queries, route)
    monkeypatch.setattr("retrograd.trajectory.update_map._SCALARS_AT_ONCE", 1)
    assert distance(scores(run, case.queries, route), expected) < 1e-12


@pytest.mark.parametrize("name", ["batchnorm", "groups", "attention"])
def test_the_pullback_is_symmetric_where_the_rule_is_plain(name: str):
    """⟨μ, Aᵀ λ⟩ = ⟨λ, Aᵀ μ⟩ for parameters alone: G is symmetric."""
    case = replace(CASES[name], clip_norm=None, second_group=())
    run = case.record(RULES["sgd"])
    state, inputs = run.state(5), run.inputs(5)
    one, other = (
        StateVectors({name: normal(2, *leaf.shape, seed=seed) for name, leaf in state.params.items()}, {}, {})
        for seed in (1, 2)
    )
    pulled, turned = (run.update_map.pullback(state, inputs, part, curvature="gauss_newton").costates for part in (one, other))
    assert torch.allclose(pulled.inner(other), turned.inner(one), rtol=1e-12)


def test_a_step_does_not_make_costates_longer():
    """A = I − η G with eigenvalues in [0, 1] for a small η; with the Hessian some costates grow."""
    run = CASES["plain"].record(RULES["sgd"])
    state, inputs = run.state(3), run.inputs(3)
    size = sum(leaf.numel() for leaf in state.params.values())
    units = torch.eye(size, dtype=torch.float64).split([leaf.numel() for leaf in state.params.values()], 1)
    unit = StateVectors(
        {name: part.reshape(size, *leaf.shape) for (name, leaf), part in zip(state.params.items(), units, strict=True)}, {}, {}
    )
    largest = {}
    for curvature in ("hessian", "gauss_newton"):
        pulled = run.update_map.pullback(state, inputs, unit, curvature=curvature).costates
        matrix = torch.cat([leaf.flatten(1) for leaf in pulled.params.values()], 1)
        largest[curvature] = torch.linalg.eigvalsh((matrix + matrix.T) / 2).max().item()
    assert largest["gauss_newton"] < 1 + 1e-12
    assert largest["hessian"] > 1.001


# ---------------------------------------------------------------------------------------------------------------------
# What is noted, and what is chosen


def test_notes_say_which_curvature():
    case = CASES["plain"]
    run = case.record(RULES["sgd"])
    for curvature, exact in (("hessian", True), ("gauss_newton", False)):
        notes = attribute(run, case.queries, method=Unrolled(curvature=curvature), check_roughness=False).notes
        assert notes["curvature"] == curvature
        assert notes["exact"] is exact
        assert "metasmoothness" not in notes


@pytest.mark.parametrize(
    ("found", "chosen"), [((0.1, 2.0), "gauss_newton"), ((0.9, 20.0), "gauss_newton"), ((0.9, 2.0), "hessian")]
)
def test_auto_takes_gauss_newton_where_the_run_is_rough(monkeypatch, found: tuple, chosen: str):
    case, calls = CASES["clipped"], []
    run = case.record(RULES["momentum"])

    def measured(run):
        calls.append(run)
        return Roughness(*found, steps=10)

    monkeypatch.setattr(unrolled_module, "roughness", measured)
    method = Unrolled(curvature="auto", route="batched")
    given = attribute(run, case.queries, method=method, query_batch=2, check_roughness=False)
    assert calls == [run]  # once, whatever the slices
    assert (given.notes["metasmoothness"], given.notes["amplification"]) == found
    assert given.notes["curvature"] == chosen
    assert given.notes["exact"] is (chosen == "hessian")
    assert distance(given.values, scores(run, case.queries, curvature=chosen)) < 1e-12


def test_auto_measures_the_run_itself():
    case = CASES["plain"]
    run = case.record(RULES["sgd"])
    given = attribute(run, case.queries, method=Unrolled(curvature="auto"), check_roughness=False)
    assert given.notes["curvature"] == "hessian"
    assert given.notes["metasmoothness"] > 0.9
    steps = [
        step
        for step, _ in Unrolled(curvature="auto").costates(
            run, StateVectors({k: v[None] for k, v in run.final_state.params.items()}, {}, {})
        )
    ]
    assert steps == list(range(len(run)))[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


class Silent:
    def losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    measurements = losses


class Coupled(Silent):
    def loss(self, model, batch, weights):
        return (weights * self.losses(model, batch)).sum()


class Doubled(Regression):
    def losses(self, model, batch):
        return 2 * super().losses(model, batch)


class Penalised(Regression):
    """Its losses know more of the parameters than the outputs do."""

    def losses(self, model, batch):
        return super().losses(model, batch) + 0.01 * model[0].weight.square().sum()


class Scalar(Regression):
    def losses(self, model, batch):
        return super().losses_of(self.outputs(model, batch), batch)

    def losses_of(self, outputs, batch):
        return super().losses_of(outputs, batch).mean()


DATA = (normal(EXAMPLES, 3, seed=1), normal(EXAMPLES, 3, seed=2))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Silent(), r"`outputs\(model, batch\)`"),
        (Coupled(), "couples the examples"),
        (Doubled(), r"Doubled\.losses and Doubled\.losses_of"),
        (Penalised(), "do not give the same losses"),
    ],
)
def test_tasks_whose_outputs_are_not_known_are_refused(task, message: str):
    run = train(small_mlp(), DATA, task, lr=0.01, weights=None)
    with pytest.raises(InputError, match=message):
        scores(run, (DATA[0][:2], DATA[1][:2]))


def test_losses_that_are_reduced_are_refused():
    run = train(small_mlp(), DATA, Scalar(), lr=0.01)
    with pytest.raises(Exception, match=r"losses_of|return"):  # in tests annotations are enforced first
        scores(run, (DATA[0][:2], DATA[1][:2]))


def test_which_tasks_know_their_outputs():
    for task in (Classification(), Regression(), NextToken()):
        assert isinstance(task, SplitTask)
        assert split_task(task) is task
    check_split(Regression(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]))
    check_split(Regression(), torch.zeros(2), torch.zeros(2))
    for other in (torch.tensor([1.0, 2.01]), torch.tensor([1.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(InputError, match="not give the same losses"):
            check_split(Regression(), torch.tensor([1.0, 2.0]), other)


def test_impossible_requests_are_refused():
    with pytest.raises(Exception, match="curvature"):  # in tests annotations are enforced first
        Unrolled(curvature="fisher")  # type: ignore[arg-type]


class HiddenWrites(nn.Module):
    """A moving average that autograd does not see."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs):
        hidden = self.linear(inputs)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
        return hidden - self.mean


def test_buffers_that_are_written_where_autograd_does_not_see_are_refused():
    run = train(HiddenWrites().double(), DATA, Regression("prediction"))
    with pytest.raises(NoSecondDerivative, match="buffer mean"):
        scores(run, (DATA[0][:2], DATA[1][:2]))


def test_a_loss_that_is_not_finite_is_refused():
    run = CASES["plain"].record(RULES["sgd"])
    state, inputs = run.state(2), run.inputs(2)
    broken = state.map(lambda leaf: leaf * float("nan"))
    costates = StateVectors({name: leaf[None] for name, leaf in state.params.items()}, {}, {})
    with pytest.raises(NonFinite, match="loss of step 2"):
        run.update_map.pullback(broken, inputs, costates, curvature="gauss_newton")


def test_nothing_is_left_behind():
    case = CASES["batchnorm"]
    run = case.record(RULES["sgd"])
    model = run.update_map.model.eval()
    model.zero_grad()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    random = torch.get_rng_state()
    scores(run, case.queries)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert all(leaf.grad is None for leaf in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
