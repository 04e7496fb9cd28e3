"""SOURCE and influence functions against their formulas with dense matrices, and against closed forms."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from retrograd import (
    CheckpointSeries,
    Classification,
    ConjugateGradients,
    DataInf,
    GaussNewton,
    Queries,
    Regression,
    TracIn,
    Unrolled,
    attribute,
    record,
)
from retrograd.adjoint import Blend, Implicit, Source
from retrograd.errors import InputError, UnsupportedTraining
from retrograd.trajectory import TrainingState
from tests.cases import CASES, RULES
from tests.reference.dense_influence import Dense, DenseOperator, dense_gauss_newton, example_gradients, query_gradients

CASE = CASES["plain"]


@pytest.mark.parametrize(("rule", "long_run"), [("sgd", 1.0), ("sgd decay", 1.0), ("momentum", 1 / 0.3), ("nesterov", 1 / 0.3)])
@pytest.mark.parametrize(("segments", "each"), [(1, 1), (2, 2), (4, 1)])
def test_source_equals_its_formula_with_dense_matrices(rule, long_run, segments, each):
    run = CASE.record(RULES[rule])  # eight steps
    found = attribute(run, CASE.queries, method=Source(segments, each, Dense()), check_roughness=False).values
    decay, rate = RULES[rule].options.get("weight_decay", 0.0), RULES[rule].options["lr"] * long_run
    steps = [(2 * index + 1) * 8 // (2 * segments * each) for index in range(segments * each)]
    costates, expected = query_gradients(run, CASE.queries), torch.zeros(4, 14, dtype=torch.float64)
    for segment in reversed(range(segments)):
        states = [run.state(step) for step in steps[segment * each : (segment + 1) * each]]
        curvature = torch.stack([dense_gauss_newton(run, state) for state in states]).mean(0)
        curvature = curvature + decay * torch.eye(len(curvature), dtype=torch.float64)
        duration = rate * 8 / segments
        kept = torch.linalg.matrix_exp(-duration * curvature)
        # Σ_k η (I − η H)^k in the limit of small steps is ∫₀ᶜ exp(−s H) ds, here by quadrature, as H has no inverse
        nodes = torch.linspace(0, duration, 4001, dtype=torch.float64)
        values, basis = torch.linalg.eigh(curvature)
        put_in = basis * torch.trapezoid(torch.exp(-nodes[:, None] * values.clamp(min=0)), nodes, dim=0) @ basis.T
        gradients = torch.stack([example_gradients(run, state) for state in states]).mean(0)
        expected -= costates @ put_in @ gradients.T / 14
        costates = costates @ kept
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_implicit_equals_its_formula_with_dense_matrices():
    run = CASE.record(RULES["sgd decay"])
    found = attribute(run, CASE.queries, method=Implicit(Dense(), damping=0.3), check_roughness=False).values
    curvature = dense_gauss_newton(run, run.final_state)
    damping = 0.3 * torch.linalg.eigvalsh(curvature).clamp(min=0).mean() + 0.05
    inverse = torch.linalg.inv(curvature + damping * torch.eye(len(curvature), dtype=torch.float64))
    expected = -query_gradients(run, CASE.queries) @ inverse @ example_gradients(run, run.final_state).T / 14
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_results_do_not_depend_on_batches_or_query_slices():
    run = CASE.record(RULES["momentum"])
    for method in (Source(2, 2, Dense()), Implicit(Dense())):
        whole = attribute(run, CASE.queries, method=method, check_roughness=False).values
        parts = attribute(run, CASE.queries, method=method, query_batch=3, memory=2 * 30 * 8 * 20).values
        assert torch.allclose(whole, parts, atol=1e-12)


def test_weights_of_the_matching_run_scale_the_curvature():
    """With all weights ½ the mean loss is halved: half the curvature, and twice the time to get as far."""
    run = CASE.record(RULES["sgd"])
    halved = run.matching(type(run.counterfactual)(0.5, "zero_weight"))
    assert halved.mean_weight == 0.5
    found = attribute(halved, CASE.queries, method=Implicit(Dense(), damping=0.3), check_roughness=False).values
    curvature = 0.5 * dense_gauss_newton(halved, halved.final_state)
    damping = 0.3 * torch.linalg.eigvalsh(curvature).clamp(min=0).mean()
    inverse = torch.linalg.inv(curvature + damping * torch.eye(len(curvature), dtype=torch.float64))
    expected = -query_gradients(halved, CASE.queries) @ inverse @ example_gradients(halved, halved.final_state).T / 14
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


@dataclass(frozen=True)
class Ridge:
    """Gauss-Newton matrix of a linear model under squared error: 2 XᵀX / N, exact everywhere."""

    inputs: Tensor

    def fit(self, run, states: Sequence[TrainingState], *, seed: int = 0, ids=None, scale=None) -> DenseOperator:
        return DenseOperator(2 * self.inputs.T @ self.inputs / len(self.inputs))


def test_a_converged_ridge_regression_agrees_with_everything():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 3, generator=draw, dtype=torch.float64)
    targets = inputs @ torch.ones(3, 1, dtype=torch.float64) + torch.randn(20, 1, generator=draw, dtype=torch.float64)
    decay = 0.1
    model = nn.Linear(3, 1, bias=False).double()
    run = record(
        model,
        (inputs, targets),
        Regression("prediction"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=decay),
        epochs=400,
        batch_size=20,
    )
    query = (torch.randn(5, 3, generator=draw, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64))
    hessian = 2 * inputs.T @ inputs / 20 + decay * torch.eye(3, dtype=torch.float64)
    residuals = inputs @ model.weight.detach().T - targets
    closed = -query[0] @ torch.linalg.inv(hessian) @ (2 * residuals * inputs).T / 20
    exact = attribute(run, query, method=Unrolled(), check_roughness=False).values
    assert torch.allclose(exact, closed, atol=1e-8)
    source = attribute(run, query, method=Source(1, 1, Ridge(inputs)), check_roughness=False).values
    implicit = attribute(run, query, method=Implicit(Ridge(inputs), damping=1e-9), check_roughness=False).values
    assert torch.allclose(implicit, closed, atol=1e-6)
    assert (source - closed).norm() < 0.2 * closed.norm()  # its gradients are those of the middle of the run
    late = attribute(run, query, method=Source(8, 1, Ridge(inputs)), check_roughness=False).values
    assert (late - closed).norm() < 1e-3 * closed.norm()


def test_what_source_cannot_do_is_refused():
    run = CASE.record(RULES["sgd"])
    with pytest.raises(InputError, match="have no 9 checkpoints"):
        attribute(run, CASE.queries, method=Source(3, 3, Dense()))
    for wrong in ({"segments": 0}, {"checkpoints_per_segment": 0}):
        with pytest.raises(InputError, match="at least 1"):
            Source(**wrong)
    with pytest.raises(InputError, match="one number for each stage"):
        Source(segments=(1, 2))
    with pytest.raises(InputError, match="inside the run"):
        attribute(run, CASE.queries, method=Source(1, 1, Dense(), stages=(8,)))
    for rule in ("adam", "nesterov"):
        with pytest.raises(UnsupportedTraining, match="heavy_ball"):
            attribute(CASE.record(RULES[rule]), CASE.queries, method=Source(1, 1, Dense(), momentum="heavy_ball"))
    with pytest.raises(InputError, match="above 0"):
        Implicit(damping=0.0)


def test_checkpoints_from_elsewhere_are_enough():
    run = CASE.record(RULES["momentum"])
    states = {step: run.state(step).params for step in (2, 6, 8)}
    series = CheckpointSeries(CASE.model(), CASE.examples, Classification(), states, learning_rate=0.2 / 0.3)
    expected = attribute(run, CASE.queries, method=Implicit(Dense()), check_roughness=False).values
    assert torch.allclose(attribute(series, CASE.queries, method=Implicit(Dense())).values, expected, atol=1e-12)
    assert attribute(series, CASE.queries, method=Source(3, 1, Dense())).values.shape == (4, 14)


def test_a_blend_is_the_mean_of_scores_with_one_spread():
    run = CASE.record(RULES["momentum"])
    methods = (Unrolled(), Source(2, 2, Dense()))
    first, second = (attribute(run, CASE.queries, method=one, check_roughness=False).values for one in methods)
    spreads = [values.std(1, correction=0, keepdim=True) for values in (first, second)]
    found = attribute(run, CASE.queries, method=Blend(methods, (0.3, 0.7)), check_roughness=False)
    assert torch.allclose(found.values, 0.3 * first + 0.7 * second * spreads[0] / spreads[1], atol=1e-12)
    assert torch.allclose(
        attribute(run, CASE.queries, method=Blend((methods[0], methods[0])), check_roughness=False).values, first, atol=1e-12
    )
    for wrong in ({"methods": methods[:1]}, {"methods": methods, "shares": (1.0,)}, {"methods": methods, "shares": (0.5, 0.6)}):
        with pytest.raises(InputError):
            Blend(**wrong)


class Scaled(nn.Module):
    """A network with a parameter that is a single number."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.layer(inputs))


@pytest.mark.parametrize("method", [TracIn(2), Implicit(), Source(2, 1), Unrolled()], ids=lambda method: type(method).__name__)
def test_a_parameter_that_is_one_number(method):
    torch.manual_seed(0)
    run = record(
        Scaled().double(),
        CASE.examples,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=2,
        batch_size=7,
        clip_norm=0.2,
    )
    found = attribute(run, CASE.queries, method=method, check_roughness=False)
    assert found.values.isfinite().all()
    assert found.values.abs().max() > 0


class Branching(nn.Module):
    """Looks at values to decide, so it cannot be vectorised over queries."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs if outputs.sum().item() > 0 else 2 * outputs


def test_query_gradients_of_models_that_cannot_be_vectorised():
    torch.manual_seed(0)
    run = record(
        Branching().double(),
        CASE.examples,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=7,
    )
    found = Queries(CASE.queries).gradients(run, run.final_state).params
    for query in range(4):
        params = {name: leaf.clone().requires_grad_() for name, leaf in run.final_state.params.items()}
        batch = tuple(column[query : query + 1] for column in CASE.queries)
        value = run.update_map.measurements(TrainingState(params, {}, {}, 0), batch)[0]
        for name, expected in zip(params, torch.autograd.grad(value, list(params.values())), strict=True):
            assert torch.allclose(found[name][query], expected, atol=1e-12)


def test_damping_from_the_training_time():
    run = CASE.record(RULES["momentum"])
    found = attribute(run, CASE.queries, method=Implicit(Dense(), damping="training_time")).values
    shift = 1 / (8 * RULES["momentum"].options["lr"] / 0.3)
    curvature = dense_gauss_newton(run, run.final_state)
    inverse = torch.linalg.inv(curvature + shift * torch.eye(len(curvature), dtype=torch.float64))
    expected = -query_gradients(run, CASE.queries) @ inverse @ example_gradients(run, run.final_state).T / 14
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_damping_from_the_training_time_of_every_coordinate(rule):
    """(G + P⁻¹ (δ + 1 / Σ η))⁻¹, which is what is left of P^½ (P^½ G P^½ + δ + 1 / Σ η)⁻¹ P^½."""
    run = CASE.record(RULES[rule])
    state = run.final_state
    found = attribute(run, CASE.queries, method=Implicit(Dense(), damping="training_time")).values
    sizes = torch.cat([torch.as_tensor(run.step_size(state, name)).flatten() for name in state.params])
    time = sum(record.hyper[0]["learning_rate"] for record in run.records)
    shrink = 0.1 if rule == "adamw" else 0.0
    matrix = dense_gauss_newton(run, state) + torch.diag((shrink + 1 / time) / sizes)
    expected = -query_gradients(run, CASE.queries) @ torch.linalg.inv(matrix) @ example_gradients(run, state).T / 14
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)
    for solver in (ConjugateGradients(1e-10), DataInf()):
        own = attribute(run, CASE.queries, method=Implicit(GaussNewton(), solver, damping="training_time")).values
        if isinstance(solver, DataInf):
            assert own.isfinite().all()
        else:
            assert torch.allclose(own, expected, rtol=1e-6, atol=1e-9)


def test_a_layer_that_is_not_used_has_no_part():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    torch.manual_seed(0)
    run = record(
        Idle().double(),
        CASE.examples,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=7,
    )
    assert attribute(run, CASE.queries, method=Implicit()).values.abs().max() > 0
