"""TRAK and the projected Gauss-Newton matrix against their formulas with dense matrices."""

import pytest
import torch
from torch import Tensor, nn

from retrograd import (
    TRAK,
    CheckpointSeries,
    Classification,
    Examples,
    Fisher,
    Implicit,
    ProjectedGaussNewton,
    Regression,
    attribute,
    record,
    self_influence,
)
from retrograd.errors import InputError, NonFinite, SolverFailed
from retrograd.linalg import Projection
from retrograd.params import flatten, unflatten
from retrograd.trajectory.update_map import UpdateMap
from tests.cases import CASES, RULES, tabular
from tests.reference.dense_influence import example_gradients, query_gradients

CASE = CASES["plain"]
COUNT = 24


@pytest.fixture(scope="module")
def runs():
    """Three runs from different starts, on more examples than the projections have dimensions."""
    return [recorded(seed) for seed in range(3)]


def recorded(seed: int, ids: Tensor | None = None, task=Classification(), order=None):  # noqa: B008
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).double()
    data = tabular(COUNT, 100)
    ids = torch.arange(COUNT) if ids is None else ids
    examples = Examples(tuple(column[ids] for column in data), ids)
    order = torch.arange(COUNT).repeat(4).view(-1, 6) if order is None else order
    return record(model, examples, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.2), order=order)


def features(run, data, dimension: int, seed: int = 0) -> Tensor:
    """G ∇f of every row of ``data``, with the whole G."""
    gradients = query_gradients(run, data)
    projection = Projection(gradients.shape[1], dimension, seed)
    return gradients @ projection.up(torch.eye(projection.dimension, dtype=torch.float64)).T


def one_minus_p(run) -> Tensor:
    inputs, labels = run.examples.batch(run.examples.ids)
    outputs = torch.func.functional_call(run.update_map.model, run.final_state.params, (inputs,))
    return 1 - outputs.softmax(1)[torch.arange(len(labels)), labels].detach()


def product(run, dimension: int, damping: float, seed: int = 0) -> Tensor:
    """φ_qᵀ (Φᵀ Φ + λ)⁻¹ φ_i, dense."""
    own = features(run, run.examples.batch(run.examples.ids), dimension, seed)
    asked = features(run, CASE.queries, dimension, seed)
    gram = own.T @ own
    shift = damping * torch.linalg.eigvalsh(gram).mean() * torch.eye(len(gram), dtype=torch.float64)
    return asked @ torch.linalg.inv(gram + shift) @ own.T


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize(("dimension", "damping"), [(6, 0.0), (6, 0.01), (500, 0.1)])
def test_trak_equals_its_formula_with_dense_matrices(runs, dimension, damping):
    found = attribute(runs[0], CASE.queries, method=TRAK(dimension, damping))
    assert close(found.values, product(runs[0], dimension, damping) * one_minus_p(runs[0]))
    assert found.notes["projection"] == dimension
    assert found.notes["models"] == 1


def test_from_the_number_of_parameters_on_trak_is_not_projected(runs):
    count = sum(leaf.numel() for leaf in runs[0].final_state.params.values())
    whole = attribute(runs[0], CASE.queries, method=TRAK(count, 0.1)).values
    gradients = query_gradients(runs[0], runs[0].examples.batch(runs[0].examples.ids))
    gram = gradients.T @ gradients
    gram = gram + 0.1 * gram.trace() / count * torch.eye(count, dtype=torch.float64)
    expected = query_gradients(runs[0], CASE.queries) @ torch.linalg.inv(gram) @ gradients.T * one_minus_p(runs[0])
    assert close(whole, expected)
    assert torch.equal(whole, attribute(runs[0], CASE.queries, method=TRAK(10 * count, 0.1)).values)


def test_an_ensemble_multiplies_the_means(runs):
    found = attribute(runs[0], CASE.queries, method=TRAK(6, 0.1, others=runs[1:]))
    products = torch.stack([product(run, 6, 0.1, seed) for seed, run in enumerate(runs)])
    shares = torch.stack([one_minus_p(run) for run in runs])
    assert close(found.values, products.mean(0) * shares.mean(0))
    assert found.notes["models"] == 3
    each = attribute(runs, CASE.queries, method=TRAK(6, 0.1)).values
    same_seed = torch.stack([product(run, 6, 0.1) for run in runs])
    assert close(each, (same_seed * shares[:, None]).mean(0))


def test_a_method_says_which_runs_it_takes_the_means_over(runs):
    assert repr(TRAK(6, others=runs[1:2])) == f"TRAK(dimension=6, damping=0.1, others=({runs[1].digest[:12]}), seed=0)"
    assert repr(TRAK(6, others=runs[1:2])) != repr(TRAK(6, others=runs[2:]))


def test_further_runs_are_matched_to_the_same_counterfactual(runs):
    found = attribute(runs[0], CASE.queries, method=TRAK(6, 0.1, others=runs[1:2]), keep=0.5, removal="zero_weight").values
    halved = [run.rerun(weights=torch.full((COUNT,), 0.5, dtype=torch.float64)) for run in runs[:2]]
    assert halved[0].mean_weight == 0.5
    products = torch.stack([product(run, 6, 0.1, seed) for seed, run in enumerate(halved)]) / 0.5  # half the curvature
    assert close(found, products.mean(0) * torch.stack([one_minus_p(run) for run in halved]).mean(0))


def test_random_halves_score_all_examples(runs):
    halves = [run.rerun(weights=(torch.arange(COUNT) % 2 == number).double()) for number, run in enumerate(runs[:2])]
    found = attribute(halves[0], CASE.queries, method=TRAK(6, 0.1, others=halves[1:])).values
    assert (found.abs().sum(0) > 0).all()


def test_trak_is_an_influence_function_of_measurements(runs):
    curvature = ProjectedGaussNewton(6, "measurements")
    expected = attribute(runs[0], CASE.queries, method=Implicit(curvature, damping=0.1)).values
    assert close(attribute(runs[0], CASE.queries, method=TRAK(6, 0.1)).values, expected)


def test_results_do_not_depend_on_memory_or_slices(runs):
    method = TRAK(6, 0.01, others=runs[1:2])
    size = sum(leaf.numel() * leaf.element_size() for leaf in runs[0].final_state.params.values())
    whole = attribute(runs[0], CASE.queries, method=method).values
    for memory in (1, 200 * size):  # nothing is kept and gradients come one by one; more
        assert close(attribute(runs[0], CASE.queries, method=method, query_batch=3, memory=memory).values, whole, 1e-10)


def test_gradients_are_taken_once_for_all_slices(runs, monkeypatch):
    seen, losses = [], UpdateMap.losses
    monkeypatch.setattr(UpdateMap, "losses", lambda self, state, batch: seen.append(1) or losses(self, state, batch))
    attribute(runs[0], CASE.queries, method=TRAK(6), query_batch=1)
    assert len(seen) == 1  # vectorised over the examples


def test_results_do_not_depend_on_the_order_of_examples(runs):
    shuffled = recorded(0, torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)))
    found = attribute(shuffled, CASE.queries, method=TRAK(6, 0.01)).values
    expected = attribute(runs[0], CASE.queries, method=TRAK(6, 0.01)).values
    assert close(found[:, shuffled.examples.ids.argsort()], expected, 1e-10)


def test_checkpoints_from_elsewhere_are_enough(runs):
    states = {16: runs[0].final_state.params}
    series = CheckpointSeries(runs[0].update_map.model, runs[0].examples, Classification(), states, learning_rate=0.2)
    expected = attribute(runs[0], CASE.queries, method=TRAK(6, 0.01)).values
    assert close(attribute(series, CASE.queries, method=TRAK(6, 0.01)).values, expected)


def test_the_share_needs_no_margin():
    """A log-probability has Q = 1, a prediction of one number the residual, the loss itself −1."""
    log_probability = recorded(0, task=Classification("log_probability"))
    expected = product(log_probability, 6, 0.1)
    assert close(attribute(log_probability, CASE.queries, method=TRAK(6, 0.1)).values, expected)
    loss = recorded(0, task=Classification("loss"))
    assert close(attribute(loss, CASE.queries, method=TRAK(6, 0.1)).values, -product(loss, 6, 0.1))
    inputs = torch.randn(COUNT, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 1).double()
    run = record(
        model,
        (inputs, inputs.sum(1, keepdim=True)),
        Regression("prediction"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=6,
    )
    found = attribute(run, (inputs[:4], torch.zeros(4, 1, dtype=torch.float64)), method=TRAK(10, 0.1)).values
    features = torch.cat([inputs, torch.ones(COUNT, 1, dtype=torch.float64)], dim=1)
    gram = features.T @ features
    inverse = torch.linalg.inv(gram + 0.1 * gram.trace() / 4 * torch.eye(4, dtype=torch.float64))
    residuals = (model(inputs) - inputs.sum(1, keepdim=True)).detach()[:, 0]
    assert close(found, features[:4] @ inverse @ features.T * -2 * residuals)


def test_single_precision_is_precise_enough():
    """Confident examples, whose p − 1 has no digits left, pass for parallel; what is parallel to rounding is not refused."""
    inputs, labels = tabular(COUNT, 100)
    data = (10 * nn.functional.one_hot(labels, 3).float() + 0.1 * inputs.float(), labels)
    torch.manual_seed(0)
    run = record(
        nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)),
        data,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        epochs=50,
        batch_size=6,
    )
    assert one_minus_p(run).max() < 1e-2
    assert attribute(run, data, method=TRAK(6)).values.isfinite().all()


def test_self_influence(runs):
    found = self_influence(runs[0], method=TRAK(6, 0.1))
    gradients = features(runs[0], runs[0].examples.batch(runs[0].examples.ids), 6)
    gram = gradients.T @ gradients
    inverse = torch.linalg.inv(gram + 0.1 * gram.trace() / 6 * torch.eye(6, dtype=torch.float64))
    leverage = torch.einsum("ia,ab,ib->i", gradients, inverse, gradients)
    assert close(found, -leverage * one_minus_p(runs[0]) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_what_trak_refuses(runs, monkeypatch):
    smoothed = recorded(0, task=Classification(label_smoothing=0.1))
    with pytest.raises(InputError, match=r"gradients of loss and measurement of example 0 at step 16 are not\s+parallel"):
        attribute(smoothed, CASE.queries, method=TRAK(6))
    with pytest.raises(SolverFailed, match=r"Φᵀ Φ of 24 examples has .* of 38 eigenvalues at 0.*Give more damping"):
        attribute(runs[0], CASE.queries, method=TRAK(500, damping=0.0))
    other = CASE.record(RULES["sgd"])
    with pytest.raises(InputError, match="same examples in the same order"):
        attribute(runs[0], CASE.queries, method=TRAK(6, others=[other]))
    with pytest.raises(InputError, match="leave out rank"):
        attribute(runs[0], CASE.queries, method=TRAK(6), rank=2)
    with pytest.raises(InputError, match="no scores by token"):
        attribute(runs[0], CASE.queries, method=TRAK(6), tokens=True)
    for wrong in ({"dimension": 0}, {"damping": -1.0}):
        with pytest.raises(InputError, match="at least"):
            TRAK(**wrong)
    losses = UpdateMap.losses
    monkeypatch.setattr(UpdateMap, "losses", lambda self, state, batch: losses(self, state, batch) * float("nan"))
    with pytest.raises(NonFinite, match="gradient of example 0 is not finite"):
        attribute(runs[0], CASE.queries, method=TRAK(6))


# ---------------------------------------------------------------------------------------------------------------------
# The curvature


@pytest.mark.parametrize("dimension", [6, 500])
def test_projected_gauss_newton_equals_its_formula(runs, dimension):
    run = runs[0]
    states = [run.state(4), run.final_state]
    draw = torch.Generator().manual_seed(3)
    scale = {name: 0.5 + torch.rand(leaf.shape, generator=draw, dtype=torch.float64) for name, leaf in states[0].params.items()}
    rows = torch.cat([example_gradients(run, state) for state in states]) * flatten(scale.values())
    count = rows.shape[1]
    whole = Projection(count, dimension, seed=7).up(torch.eye(min(dimension, count), dtype=torch.float64))
    inner = rows @ whole.T
    values, basis = torch.linalg.eigh(inner.T @ inner / len(rows))
    function = lambda eigenvalues, mean: 1 / (eigenvalues + 0.1 * mean)  # noqa: E731
    inverse = basis / (values.clamp(min=0) + 0.1 * values.mean()) @ basis.T
    operator = ProjectedGaussNewton(dimension, "losses", batch_size=5).fit(run, states, seed=7, scale=scale)
    vectors = torch.randn(2, count, generator=draw, dtype=torch.float64)
    found = operator.apply(function, unflatten(vectors, states[0].params))
    assert close(flatten(found.values(), batched=True), vectors @ whole.T @ inverse @ whole)


def test_sampled_gradients_are_those_of_the_fisher_matrix(runs):
    expected = attribute(runs[0], CASE.queries, method=Implicit(Fisher(samples=2), damping=0.1)).values
    curvature = ProjectedGaussNewton(500, batch_size=7, samples=2)
    assert close(attribute(runs[0], CASE.queries, method=Implicit(curvature, damping=0.1)).values, expected)


def test_projected_gauss_newton_of_some_examples(runs):
    few = ProjectedGaussNewton(6, "losses", examples=[3, 1, 8]).fit(runs[0], [runs[0].final_state])
    same = ProjectedGaussNewton(6, "losses").fit(runs[0], [runs[0].final_state], ids=torch.tensor([1, 3, 8]))
    assert torch.allclose(few.eigenvalues, same.eigenvalues, rtol=1e-10, atol=1e-16)
    assert (few.eigenvalues[:3] < 1e-12 * few.eigenvalues[-1]).all()
    for wrong in ({"dimension": 0}, {"batch_size": 0}):
        with pytest.raises(InputError):
            ProjectedGaussNewton(**wrong)


class Two:
    """A task whose measurement gives two numbers for each example."""

    def losses(self, model, batch):
        return model(batch[0]).square().sum(1)

    def measurements(self, model, batch):
        return model(batch[0]).flatten()


def test_measurements_must_be_one_number_for_each_example():
    inputs = torch.randn(6, 2, dtype=torch.float64)
    run = record(
        nn.Linear(2, 2).double(), (inputs,), Two(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=1, batch_size=6
    )
    with pytest.raises(InputError, match="one number per example"):
        ProjectedGaussNewton(2, "measurements").fit(run, [run.final_state])
