"""Every solver next to its own formula with dense matrices, closed forms, and leave-one-out retraining."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from retrograd import (
    EKFAC,
    Astra,
    Classification,
    ConjugateGradients,
    DataInf,
    Examples,
    GaussNewton,
    Hessian,
    Implicit,
    Neumann,
    Nystrom,
    Queries,
    Regression,
    Spectral,
    Unrolled,
    attribute,
    citation,
    record,
)
from retrograd.adjoint import Engine
from retrograd.adjoint.solvers import Solver, System
from retrograd.curvature import ProductOperator
from retrograd.errors import InputError, SolverFailed
from retrograd.noise import Noise
from retrograd.params import flatten, unflatten
from tests.cases import CASES, RULES
from tests.reference import dense_solvers
from tests.reference.dense_curvature import dense
from tests.reference.dense_influence import dense_gauss_newton, example_gradients, query_gradients
from tests.tolerances import TOLERANCES

RELATIVE = TOLERANCES["approximate_vs_own_formula"]
CASE = CASES["plain"]
DAMPING = 0.5


@dataclass(frozen=True)
class Tabulated:
    """The Gauss-Newton matrix as products with dense matrices of the examples, which are quick; the real ones are compared
    with them elsewhere."""

    def fit(self, run, states, *, seed=0, ids=None, scale=None):
        single = [dense_gauss_newton(run, states[0], number[None]) for number in run.examples.ids.sort().values]
        matrices = torch.stack(single)

        def product(state, vectors, some):
            rows = flatten((vectors[name] for name in state.params), batched=True)
            return unflatten(rows @ matrices[some].mean(0), state.params)

        return ProductOperator(product, tuple(states), run.examples.ids, scale, None, 2, seed, definite=True)


@pytest.fixture(scope="module")
def run():
    return CASE.record(RULES["sgd decay"])


@pytest.fixture(scope="module")
def halved():
    recorded = CASE.record(RULES["sgd decay"])
    return recorded.matching(type(recorded.counterfactual)(0.5, "zero_weight"))


def assert_close(found, expected, relative=RELATIVE):
    error = (found - expected).norm() / expected.norm()
    assert error <= relative, f"relative error {error:.1e}"


def solved(run, solver, curvature=None, damping=DAMPING):
    """The solver's x, flat, the right-hand sides, and its notes."""
    engine, state = Engine(), run.final_state
    system = System(run, state, curvature or Tabulated(), damping, 0, engine)
    right = Queries(CASE.queries).gradients(run, state).params
    found = solver.solve(system, right)
    assert list(found) == list(right)
    return flatten(found.values(), batched=True), flatten(right.values(), batched=True), engine.notes.entries


def scores(run, solver, curvature=None, damping=DAMPING, **options):
    method = Implicit(curvature or Tabulated(), solver, damping)
    return attribute(run, CASE.queries, method=method, check_roughness=False, **options).values


def matrix_and_shift(run, ids=None):
    matrix = dense_gauss_newton(run, run.final_state)
    shift = 0.05 + DAMPING * run.mean_weight * matrix.trace().item() / len(matrix)
    part = matrix if ids is None else dense_gauss_newton(run, run.final_state, ids)
    return dense_solvers.damped(run.mean_weight * part, shift), shift


def batches(run, size, count, seed):
    """Every example once in random order, then again; written out."""
    ids, generator = run.examples.ids.sort().values, torch.Generator().manual_seed(seed)
    line = torch.cat([ids[torch.randperm(14, generator=generator)] for _ in range(count)])
    return [line[number * size : (number + 1) * size] for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Next to their formulas


@pytest.mark.parametrize("which", ["run", "halved"])
@pytest.mark.parametrize(
    "solver",
    [
        Spectral(),
        ConjugateGradients(1e-12),
        ConjugateGradients(1e-12, preconditioner=EKFAC()),
        ConjugateGradients(1e-12, preconditioner=Nystrom(10)),
        Neumann(1500),
        Astra(600, batch_size=None, halve_every=600),
    ],
    ids=repr,
)
def test_solvers_that_converge_give_the_damped_inverse(request, which, solver):
    run = request.getfixturevalue(which)
    assert isinstance(solver, Solver)
    matrix, shift = matrix_and_shift(run)
    found, right, notes = solved(run, solver)
    assert_close(found, right @ torch.linalg.inv(matrix))
    if not isinstance(solver, Spectral):
        assert notes["added_to_eigenvalues"] == pytest.approx(shift, rel=1e-10)
        assert 0 < notes["solver_iterations"] <= 1500
        assert notes["largest_residual"] < 1e-8
        assert citation(solver).startswith("@")


def test_preconditioners_save_iterations(run):
    plain = solved(run, ConjugateGradients(1e-10), damping=1e-3)[2]
    helped = solved(run, ConjugateGradients(1e-10, preconditioner=Nystrom(40)), damping=1e-3)[2]
    assert helped["solver_iterations"] < plain["solver_iterations"] / 3


def test_a_truncated_series_and_its_step(run):
    matrix, _ = matrix_and_shift(run)
    found, right, notes = solved(run, Neumann(7, step=0.3))
    assert_close(found, dense_solvers.neumann([matrix] * 7, right, 0.3))
    assert notes["step"] == 0.3
    assert notes["largest_residual"] == pytest.approx(((right - found @ matrix).norm(dim=1) / right.norm(dim=1)).max().item())
    found, right, notes = solved(run, Neumann(7))
    assert notes["step"] == pytest.approx(1 / torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-6)
    assert_close(found, dense_solvers.neumann([matrix] * 7, right, notes["step"]))


def test_lissa_equals_its_formula_with_the_same_mini_batches(run):
    found, right, notes = solved(run, Neumann(9, step=0.2, batch_size=4, seed=5, repeats=2))
    expected = [
        dense_solvers.neumann([matrix_and_shift(run, ids)[0] for ids in batches(run, 4, 9, seed)], right, 0.2)
        for seed in (5, 6)
    ]
    assert_close(found, (expected[0] + expected[1]) / 2)
    matrix, _ = matrix_and_shift(run)
    residuals = [((right - own @ matrix).norm(dim=1) / right.norm(dim=1)).max().item() for own in expected]
    assert notes["largest_residual"] == pytest.approx(max(residuals))  # with all examples, not a mini-batch's
    found, right, notes = solved(run, Neumann(3, batch_size=4, seed=5))
    largest = max(torch.linalg.eigvalsh(matrix_and_shift(run, ids)[0])[-1].item() for ids in batches(run, 4, 3, 5))
    assert notes["step"] == pytest.approx(1 / largest, rel=1e-6)


@pytest.mark.parametrize("preconditioner_damping", [None, 0.7])
def test_astra_equals_its_formula_with_the_same_mini_batches(run, preconditioner_damping):
    solver = Astra(11, step=0.1, batch_size=4, halve_every=3, seed=2, preconditioner_damping=preconditioner_damping)
    found, right, _ = solved(run, solver)
    state, shift = run.final_state, matrix_and_shift(run)[1]
    kronecker = dense(EKFAC().fit(run, [state]), state.params)
    preconditioner = dense_solvers.damped(kronecker, preconditioner_damping or shift)
    matrices = [matrix_and_shift(run, ids)[0] for ids in batches(run, 4, 11, 2)]
    assert_close(found, dense_solvers.astra(matrices, right, preconditioner, 0.1, 0.9, 3))


def test_astra_begins_with_the_ekfac_solution(run):
    """Which is what one step of α = 1 from 0 gives."""
    state, shift = run.final_state, matrix_and_shift(run)[1]
    preconditioner = dense_solvers.damped(dense(EKFAC().fit(run, [state]), state.params), shift)
    found, right, _ = solved(run, Astra(1, step=1e-14, batch_size=None))
    start = right @ torch.linalg.inv(preconditioner)
    assert_close(found, start, 1e-10)
    one_step = torch.zeros_like(right) - 1.0 * (0 - right) @ torch.linalg.inv(preconditioner)
    assert_close(one_step, start, 1e-12)
    exact = right @ torch.linalg.inv(matrix_and_shift(run)[0])
    errors = [(solved(run, Astra(count, batch_size=None))[0] - exact).norm().item() for count in (1, 50, 100, 300)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[3] < 1e-5 * errors[0]


def test_stochastic_solvers_come_near(run):
    exact = solved(run, Spectral())[0]
    for solver, allowed in ((Neumann(800, batch_size=7, repeats=4), 0.15), (Astra(300, batch_size=7), 0.1)):
        found, _, notes = solved(run, solver)
        assert (found - exact).norm() < allowed * exact.norm()
        assert notes["solver_iterations"] in (300, 800)


@pytest.mark.parametrize("which", ["run", "halved"])
@pytest.mark.parametrize("name", ["plain", "cnn", "tied"])
def test_datainf_equals_its_formula(request, which, name):
    run = request.getfixturevalue(which) if name == "plain" else CASES[name].record(RULES["sgd decay"])
    state, engine = run.final_state, Engine()
    right = {key: torch.randn(3, *leaf.shape, dtype=torch.float64) for key, leaf in state.params.items()}
    found = DataInf(batch_size=4).solve(System(run, state, EKFAC(), 0.1, 0, engine), right)
    rows = flatten(right.values(), batched=True)
    expected = dense_solvers.datainf(run, state, rows, 0.1, run.mean_weight, 0.05)
    assert_close(flatten(found.values(), batched=True), expected)
    assert 0.05 < engine.notes.entries["added_to_eigenvalues"] <= engine.notes.entries["added_at_most"]


def test_datainf_is_exact_for_one_example():
    """The inverse of a mean over one is the mean of inverses: damped inverse of g gᵀ, by layers."""
    model = nn.Linear(3, 3, bias=False).double()
    data = (CASE.examples[0][:1], CASE.examples[1][:1])
    run = record(model, data, Classification(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, batch_size=1)
    found = attribute(run, CASE.queries, method=Implicit(solver=DataInf()), check_roughness=False).values
    (row,) = example_gradients(run, run.final_state)
    inverse = torch.linalg.inv(dense_solvers.damped(torch.outer(row, row), 0.1 * row.square().mean().item()))
    assert_close(found, -query_gradients(run, CASE.queries) @ inverse @ row[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


def test_sums_of_inverses_run_over_all_examples_not_batch_by_batch(run):
    """A library in use takes each batch's own inverse and adds them up, 1.7 times off with two batches."""
    whole = scores(run, DataInf(batch_size=14))
    assert_close(scores(run, DataInf(batch_size=7)), whole, 1e-10)
    assert_close(scores(run, DataInf(batch_size=5)), whole, 1e-10)
    for solver in (Spectral(), ConjugateGradients(1e-12), Neumann(9, step=0.1), Astra(9, step=0.1, batch_size=5)):
        whole = scores(run, solver, GaussNewton(9, batch_size=14))
        assert_close(scores(run, solver, GaussNewton(9, batch_size=7)), whole, 1e-10)


SOLVERS = [Spectral(), ConjugateGradients(1e-12), Neumann(20, batch_size=4), Astra(9, step=0.1, batch_size=4), DataInf(5)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_results_do_not_depend_on_order_or_query_slices(run, solver):
    whole = scores(run, solver)
    assert_close(scores(run, solver, query_batch=3), whole, 1e-10)
    order, other = torch.randperm(14, generator=torch.Generator().manual_seed(7)), copy.copy(run)
    columns = tuple(column[order] for column in run.examples.batch(run.examples.ids))
    other.examples = Examples(columns, run.examples.ids[order])
    assert_close(scores(other, solver)[:, other.examples.ids.argsort()], whole, 1e-10)


def test_seeds_decide_mini_batches(run):
    for solver in (Neumann(9, step=0.1, batch_size=4), Astra(9, step=0.1, batch_size=4)):
        first, again, other = (solved(run, own)[0] for own in (solver, solver, replace(solver, seed=1)))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)


def test_notes_hold_the_worst_of_all_query_slices(run):
    method = Implicit(Tabulated(), Neumann(30), DAMPING)
    whole = attribute(run, CASE.queries, method=method, check_roughness=False).notes
    parts = attribute(run, CASE.queries, method=method, query_batch=1, check_roughness=False).notes
    assert parts["largest_residual"] == pytest.approx(whole["largest_residual"], rel=1e-8)
    assert parts["solver_iterations"] == whole["solver_iterations"] == 30


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms and retraining


def test_everything_agrees_on_ridge_regression(monkeypatch):
    """One output and normal noise of one size: EK-FAC is exact, too, and DataInf is what it is."""
    monkeypatch.setattr(Noise, "normal", lambda self, *shape: torch.ones(len(self._state), *shape, dtype=torch.float64))
    draw, decay = torch.Generator().manual_seed(0), 0.1
    inputs = torch.randn(20, 3, generator=draw, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True) + torch.randn(20, 1, generator=draw, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=decay)
    run = record(model, (inputs, targets), Regression("prediction"), optimizer=optimizer, epochs=150, batch_size=20)
    query = (torch.randn(5, 3, generator=draw, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64))
    hessian = dense_solvers.damped(2 * inputs.T @ inputs / 20, decay + 1e-12)
    residuals = inputs @ run.final_state.params["weight"].T - targets
    closed = -query[0] @ torch.linalg.inv(hessian) @ (2 * residuals * inputs).T / 20
    methods = [
        Implicit(GaussNewton(), Spectral(), 1e-12),
        Implicit(Hessian(), ConjugateGradients(1e-12), 1e-12),
        Implicit(GaussNewton(), Neumann(150), 1e-12),
        Implicit(GaussNewton(), Astra(30, batch_size=None), 1e-12),
        Implicit(EKFAC(), damping=1e-12),
        Implicit(Nystrom(3), damping=1e-12),
        Unrolled(),
    ]
    for method in methods:
        found = attribute(run, query, method=method, check_roughness=False).values
        assert_close(found, closed)


def test_a_converged_convex_problem_equals_leave_one_out_retraining():
    draw, decay, count = torch.Generator().manual_seed(1), 0.1, 40
    inputs = torch.randn(count, 2, generator=draw, dtype=torch.float64)
    labels = (inputs[:, 0] + 0.8 * torch.randn(count, generator=draw, dtype=torch.float64) > 0).long()
    model = nn.Linear(2, 2, bias=True).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=decay)
    task = Classification("log_probability")
    run = record(model, (inputs, labels), task, optimizer=optimizer, epochs=300, batch_size=count)
    state = run.final_state
    gradient = example_gradients(run, state).mean(0) + decay * flatten(state.params.values())
    assert gradient.norm() < 1e-8
    wide = torch.cat([inputs, torch.ones(count, 1, dtype=torch.float64)], 1)
    query = (torch.randn(5, 2, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1]))

    def trained(weights):
        """Minimise by Newton's method; return what the queries measure."""

        def loss(vector):
            logits = wide @ torch.cat([vector[:4].view(2, 2), vector[4:, None]], 1).T
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return (weights * losses).sum() / count + decay / 2 * vector.square().sum()

        vector = flatten(state.params.values())
        for _ in range(10):
            vector = vector - torch.linalg.solve(torch.func.hessian(loss)(vector), torch.func.grad(loss)(vector))
        logits = torch.func.functional_call(model, unflatten(vector, state.params), (query[0],))
        return logits.log_softmax(1).gather(1, query[1][:, None])[:, 0], torch.func.grad(loss)(vector).norm()

    def changed(amount):
        """Change every weight in turn; what the queries measure, [query, example]."""
        measured, slopes = torch.func.vmap(trained)(1 + amount * torch.eye(count, dtype=torch.float64))
        assert slopes.max() < 1e-12
        return measured.detach().T

    assert list(state.params) == ["weight", "bias"]
    step = 1e-4
    differences = (changed(step) - changed(-step)) / (2 * step)
    removed = changed(-1.0) - changed(0.0)
    for curvature, solver in (
        (Hessian(None), Spectral()),
        (GaussNewton(None), Spectral()),
        (GaussNewton(6), Spectral()),
        (Hessian(), ConjugateGradients(1e-10)),
        (GaussNewton(), Astra(200, batch_size=None, halve_every=200)),
    ):
        found = attribute(run, query, method=Implicit(curvature, solver, 1e-9), check_roughness=False).values
        assert_close(found, differences, 1e-5)
        pairs = torch.stack([-found.flatten(), removed.flatten()])
        assert torch.corrcoef(pairs)[0, 1] > 0.99
        ranks = pairs.argsort(1).argsort(1).double()
        assert torch.corrcoef(ranks)[0, 1] > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_what_solvers_cannot_do_is_refused(run):
    for solver in (ConjugateGradients(), Neumann(), Astra()):
        with pytest.raises(InputError, match="EKFAC has no products"):
            scores(run, solver, EKFAC())
    for wrong in (
        lambda: Neumann(repeats=0),
        lambda: Neumann(batch_size=0),
        lambda: Astra(halve_every=0),
        lambda: Astra(batch_size=0),
        lambda: Astra(preconditioner_damping=0.0),
        lambda: DataInf(batch_size=0),
    ):
        with pytest.raises(InputError, match="must be"):
            wrong()
    for solver in (
        Neumann(0),
        Neumann(step=-1.0),
        Astra(0),
        Astra(momentum=1.0),
        ConjugateGradients(0.0),
        ConjugateGradients(iterations=0),
    ):
        with pytest.raises(InputError):
            scores(run, solver)


def test_what_does_not_converge_is_an_error(run):
    with pytest.raises(SolverFailed, match="of 4 queries unsolved after 2 iterations"):
        scores(run, ConjugateGradients(1e-10, iterations=2))
    with pytest.raises(SolverFailed, match="positive definite"):
        scores(run, ConjugateGradients(), Hessian(), damping=1e-3)
    for solver in (Neumann(2000, step=50.0), Astra(2000, step=50.0, halve_every=2000)):
        with pytest.raises(SolverFailed, match="diverges"):
            scores(run, solver)


def test_a_layer_without_gradients_gets_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(2, 2)

        def forward(self, inputs):
            return self.used(inputs) + 0 * self.unused.weight.sum()

    model = Unused().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = record(model, CASE.examples, Classification(), optimizer=optimizer, epochs=1, batch_size=7)
    found = attribute(run, CASE.queries, method=Implicit(solver=DataInf()), check_roughness=False).values
    assert found.isfinite().all()
    assert found.abs().max() > 0
