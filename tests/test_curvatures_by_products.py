"""Curvatures made of products, and the diagonal, next to dense matrices of their own formulas."""

import copy
import gc
import weakref
from dataclasses import dataclass, replace

import pytest
import torch

from retrograd import EKFAC, Classification, Examples, Implicit, Source, attribute, record
from retrograd.curvature import (
    Arnoldi,
    Curvature,
    Diagonal,
    GaussNewton,
    Hessian,
    Nystrom,
    Operator,
    ProductOperator,
    gauss_newton,
    hessian_product,
    products,
)
from retrograd.errors import InputError, SolverFailed
from retrograd.params import count, flatten, unflatten
from tests.cases import CASES, RULES, normal
from tests.reference import dense_influence
from tests.reference.dense_curvature import SEED, dense, dense_gauss_newton, gradient_rows, matrix_of
from tests.reference.dense_influence import Dense
from tests.reference.dense_solvers import damped, dense_hessian
from tests.tolerances import TOLERANCES

RELATIVE = TOLERANCES["approximate_vs_own_formula"]
CASE = CASES["plain"]
FUNCTIONS = {
    "identity": (lambda s: s, lambda m: m),
    "damped inverse": (lambda s: 1 / (s + 0.05), lambda m: torch.linalg.inv(damped(m, 0.05))),
    "exponential": (lambda s: torch.exp(-3 * s), lambda m: torch.matrix_exp(-3 * m)),
}


@pytest.fixture(scope="module")
def runs():
    return {name: CASES[name].record(RULES["sgd"]) for name in ("plain", "groups", "batchnorm", "tied", "cnn", "attention")}


def assert_close(found, expected, relative=RELATIVE):
    error = (found - expected).norm() / expected.norm()
    assert error <= relative, f"relative error {error:.1e}"


def some_scale(state):
    draw = torch.Generator().manual_seed(3)
    return {key: 0.5 + torch.rand(leaf.shape, generator=draw, dtype=torch.float64) for key, leaf in state.params.items()}


def vectors_of(state, rows=3):
    return {name: normal(rows, *leaf.shape, seed=number) for number, (name, leaf) in enumerate(state.params.items())}


def shuffled(run):
    """The same run with its examples in another order."""
    order, other = torch.randperm(14, generator=torch.Generator().manual_seed(7)), copy.copy(run)
    columns = tuple(column[order] for column in run.examples.batch(run.examples.ids))
    other.examples = Examples(columns, run.examples.ids[order])
    return other


# ---------------------------------------------------------------------------------------------------------------------
# Operators against their formulas


@pytest.mark.parametrize("name", ["plain", "groups", "tied", "cnn", "attention"])
def test_the_diagonal_is_that_of_the_fisher_matrix(runs, name):
    run = runs[name]
    states, scale = [run.state(3), run.final_state], some_scale(run.final_state)
    operator = Diagonal(samples=2, batch_size=5).fit(run, states, seed=SEED)
    squares = torch.cat([gradient_rows(run, state, 2) for state in states]).square().mean(0)
    assert_close(dense(operator, states[0].params), squares.diag())
    scaled = Diagonal(samples=2).fit(run, states, seed=SEED, scale=scale)
    assert_close(dense(scaled, states[0].params), (flatten(scale.values()) ** 2 * squares).diag())
    assert [block.names for block in operator.blocks] == [(key,) for key in run.update_map.names]


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, None) for name in ("plain", "groups", "batchnorm", "tied", "cnn", "attention")] + [("plain", 59)],
)
@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_functions_of_products_equal_functions_of_the_dense_matrix(runs, name, kind, steps):
    """With as many steps as parameters the Krylov space of every vector is exhausted."""
    run = runs[name]
    states = [run.state(3), run.final_state]
    reference = dense_gauss_newton if kind is GaussNewton else dense_hessian
    matrix = torch.stack([reference(run, state) for state in states]).mean(0)
    assert steps in (None, len(matrix))
    operator = kind(steps, batch_size=14 if steps else 5).fit(run, states)
    units = unflatten(torch.eye(len(matrix), dtype=torch.float64), states[0].params)
    shift = 0.0 if kind is GaussNewton else 2 * max(0.0, -torch.linalg.eigvalsh(matrix)[0].item())
    for ours, theirs in FUNCTIONS.values():
        found = operator.apply(lambda s, _, f=ours: f(s + shift), units)
        assert_close(matrix_of(found, states[0].params), theirs(damped(matrix, shift)))
    assert_close(matrix_of(operator.multiply(units), states[0].params), matrix, 1e-12)


def test_hessian_products_are_exact(runs):
    for name, run in runs.items():
        state = run.state(5)
        expected = dense_hessian(run, state, torch.arange(9))
        units = unflatten(torch.eye(len(expected), dtype=torch.float64), state.params)
        for size in (256, 4):
            found = matrix_of(hessian_product(run, state, units, torch.arange(9), size), state.params)
            assert_close(found, expected, 1e-12), name


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_scale_and_ids(runs, kind):
    run, state = runs["plain"], runs["plain"].final_state
    scale, ids = some_scale(state), torch.tensor([2, 5, 11, 12])
    flat = flatten(scale.values())
    matrix = dense_hessian(run, state, ids) if kind is Hessian else dense_influence.dense_gauss_newton(run, state, ids)
    expected = damped(flat[:, None] * matrix * flat, 1.0)
    for operator in (
        kind(None, batch_size=3).fit(run, [state], ids=ids, scale=scale),
        kind(59, examples=ids.tolist()).fit(run, [state], scale=scale),
    ):
        assert_close(dense(operator, state.params, lambda s: 1 / (s + 1)), torch.linalg.inv(expected))


@pytest.mark.parametrize("rank", [5, 59])
def test_nystrom_equals_its_formula_with_the_same_draw(runs, rank):
    run = runs["plain"]
    states, scale = [run.state(3), run.final_state], some_scale(run.final_state)
    flat = flatten(scale.values())
    matrix = flat[:, None] * torch.stack([dense_gauss_newton(run, state) for state in states]).mean(0) * flat
    draw = torch.randn(59, rank, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    sketch = matrix @ draw
    expected = sketch @ torch.linalg.inv(draw.T @ sketch) @ sketch.T if rank == 5 else matrix
    operator = Nystrom(rank).fit(run, states, seed=SEED, scale=scale)
    for ours, theirs in FUNCTIONS.values():
        assert_close(dense(operator, states[0].params, ours), theirs(expected))
    means = []
    operator.apply(lambda s, mean: means.append(mean) or s, vectors_of(states[0]))
    assert means[0] == pytest.approx(expected.trace().item() / 59, rel=1e-10)


@pytest.mark.parametrize(("steps", "rank"), [(8, 3), (8, 8), (59, 6)])
@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_arnoldi_equals_rayleigh_ritz_in_the_same_krylov_space(runs, kind, steps, rank):
    run, state = runs["plain"], runs["plain"].final_state
    matrix = dense_gauss_newton(run, state) if kind is GaussNewton else dense_hessian(run, state)
    start = torch.randn(59, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    rows = [start / start.norm()]
    for _ in range(steps - 1):
        moved = matrix @ rows[-1]
        for _ in range(3):
            moved = moved - torch.stack(rows).T @ (torch.stack(rows) @ moved)
        if moved.norm() < 1e-12:
            break
        rows.append(moved / moved.norm())
    space = torch.stack(rows)
    values, small = torch.linalg.eigh(space @ matrix @ space.T)
    kept, vectors = values[-rank:], space.T @ small[:, -rank:]
    operator = Arnoldi(steps, rank, kind()).fit(run, [state], seed=SEED)
    # f is 0, not f(0), on what is dropped
    shift = max(0.0, -2 * values[0].item()) + 0.1
    found = dense(operator, state.params, lambda s: 1 / (s + shift))
    assert_close(found, vectors / (kept + shift) @ vectors.T)
    if steps == 59:
        assert_close(kept, torch.linalg.eigvalsh(matrix)[-rank:])


# ---------------------------------------------------------------------------------------------------------------------
# The mean eigenvalue


def test_the_mean_eigenvalue_is_that_of_the_whole_matrix(runs):
    run, state = runs["plain"], runs["plain"].final_state
    matrix = dense_gauss_newton(run, state)
    found = []
    for steps in (None, 4):
        operator = GaussNewton(steps, probes=2000).fit(run, [state])
        operator.apply(lambda s, mean: found.append(mean) or s, vectors_of(state))
    assert found[0] == pytest.approx(matrix.trace().item() / 59, rel=1e-10)
    assert found[1] == pytest.approx(matrix.trace().item() / 59, rel=0.05)
    means = {GaussNewton(4, batch_size=size).fit(other, [state]).mean for size in (3, 256) for other in (run, shuffled(run))}
    assert max(means) - min(means) < 1e-12 * max(means)
    assert GaussNewton(4).fit(run, [state], seed=1).mean not in means


# ---------------------------------------------------------------------------------------------------------------------
# One Krylov space for several functions


def counting(operator):
    calls = []
    return replace(operator, product=lambda *args: calls.append(args) or operator.product(*args)), calls


def test_functions_of_the_same_vectors_share_one_krylov_space(runs):
    state = runs["plain"].final_state
    operator, calls = counting(GaussNewton(6).fit(runs["plain"], [state]))
    assert operator.mean > 0
    calls.clear()
    vectors = vectors_of(state)
    first = operator.apply(lambda s, _: torch.exp(-s), vectors)
    assert len(calls) == 6
    operator.apply(lambda s, _: 1 / (s + 1), vectors)
    again = operator.apply(lambda s, _: torch.exp(-s), dict(reversed(vectors.items())))
    assert len(calls) == 6
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_vectors_that_changed_or_are_others_are_not_taken_for_the_same(runs):
    state = runs["plain"].final_state
    operator, calls = counting(GaussNewton(6).fit(runs["plain"], [state]))
    vectors = vectors_of(state)
    first = operator.apply(lambda s, _: s, vectors)
    calls.clear()
    vectors["2.weight"].mul_(2)  # the same tensor, with other numbers
    changed = operator.apply(lambda s, _: s, vectors)
    assert len(calls) == 6
    assert not torch.allclose(first["0.weight"], changed["0.weight"])
    operator.apply(lambda s, _: s, {name: leaf.clone() for name, leaf in vectors.items()})
    assert len(calls) == 12
    with torch.inference_mode():
        silent = {name: leaf.clone() for name, leaf in vectors.items()}
    calls.clear()
    for _ in range(2):
        operator.apply(lambda s, _: s, silent)
    assert len(calls) == 12


def test_krylov_spaces_die_with_their_vectors(runs):
    state = runs["plain"].final_state
    operator = GaussNewton(6).fit(runs["plain"], [state])
    vectors = vectors_of(state)
    operator.apply(lambda s, _: s, vectors)
    (space,) = operator._last._spaces
    held = weakref.ref(space)
    del space, vectors
    gc.collect()
    assert held() is None
    assert operator._last._spaces is None


def test_vectors_in_slices_give_the_same(runs, monkeypatch):
    state = runs["plain"].final_state
    vectors = vectors_of(state, 5)
    whole = GaussNewton(59).fit(runs["plain"], [state]).apply(lambda s, mean: 1 / (s + mean), vectors)
    monkeypatch.setattr(products, "_KEPT_SCALARS", 59 * 59 * 2)
    operator = GaussNewton(59).fit(runs["plain"], [state])
    parts = operator.apply(lambda s, mean: 1 / (s + mean), vectors)
    assert operator._last._spaces is None
    for name, leaf in whole.items():
        assert torch.allclose(parts[name], leaf, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(gauss_newton, "_TANGENTS", 2)
    found = operator.multiply(vectors)
    monkeypatch.setattr(gauss_newton, "_TANGENTS", 100)
    for name, leaf in operator.multiply(vectors).items():
        assert torch.allclose(found[name], leaf, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


@pytest.mark.parametrize("rule", ["sgd decay", "adam"])
def test_source_with_products_equals_source_with_dense_matrices(rule):
    run = CASE.record(RULES[rule])
    expected = attribute(run, CASE.queries, method=Source(2, 2, Dense()), check_roughness=False).values
    coarse = attribute(run, CASE.queries, method=Source(2, 1, Dense()), check_roughness=False).values
    for steps in (59, None):  # the Krylov spaces of four costates are exhausted after 59 steps
        found = attribute(run, CASE.queries, method=Source(2, 2, GaussNewton(steps)), check_roughness=False).values
        assert_close(found, expected)
    errors = []
    for steps in (2, 8):
        found = attribute(run, CASE.queries, method=Source(2, 1, GaussNewton(steps)), check_roughness=False).values
        errors.append((found - coarse).norm())
    assert errors[0] > 100 * errors[1]


def test_implicit_with_products_equals_implicit_with_dense_matrices():
    run = CASE.record(RULES["sgd decay"])
    expected = attribute(run, CASE.queries, method=Implicit(Dense(), damping=0.3), check_roughness=False).values
    found = attribute(run, CASE.queries, method=Implicit(GaussNewton(None), damping=0.3), check_roughness=False).values
    assert_close(found, expected)
    timed = [
        attribute(run, CASE.queries, method=Implicit(own, damping="training_time"), check_roughness=False).values
        for own in (Dense(), GaussNewton(None), Nystrom(59))
    ]
    for own in timed[1:]:
        assert_close(own, timed[0])


@pytest.mark.parametrize(
    "method", [Diagonal(), GaussNewton(12), GaussNewton(None), Nystrom(7), Nystrom(59), Arnoldi(20, 5)], ids=repr
)
def test_results_depend_on_no_batches_order_or_slices(runs, method):
    assert isinstance(method, Curvature)
    run, queries = runs["plain"], CASE.queries
    whole = attribute(run, queries, method=Implicit(method), check_roughness=False)
    if isinstance(method, (Diagonal, GaussNewton)):
        small = replace(method, batch_size=3)
    else:
        small = replace(method, of=GaussNewton(batch_size=3))
    for found in (
        attribute(run, queries, method=Implicit(small), check_roughness=False).values,
        attribute(run, queries, method=Implicit(method), query_batch=3, check_roughness=False).values,
        attribute(shuffled(run), queries, method=Implicit(method), check_roughness=False).values[
            :, shuffled(run).examples.ids.argsort()
        ],
    ):
        assert_close(found, whole.values, 1e-10)


def test_hessians_with_negative_eigenvalues_are_refused(runs):
    run = runs["plain"]
    assert torch.linalg.eigvalsh(dense_hessian(run, run.final_state))[0] < -1e-3
    for steps in (None, 40):
        with pytest.raises(SolverFailed, match="this is no minimum"):
            attribute(run, CASE.queries, method=Implicit(Hessian(steps), damping=1e-3), check_roughness=False)
    with pytest.raises(SolverFailed, match="positive semidefinite"):
        Nystrom(40, Hessian()).fit(run, [run.final_state])


@dataclass(frozen=True)
class Plain:
    """A task that does not say what its outputs are."""

    def losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    measurements = losses


def test_what_they_cannot_do_is_refused(runs, monkeypatch):
    run, state = runs["plain"], runs["plain"].final_state
    for method in (GaussNewton(), Hessian(), Nystrom(3), Arnoldi(9, 3), Diagonal()):
        operator = method.fit(run, [state])
        assert isinstance(operator, Operator)
        vectors = vectors_of(state)
        with pytest.raises(InputError, match=r"lack \['0.weight'\]"):
            operator.apply(lambda s, _: s, {name: vectors[name] for name in list(vectors)[1:]})
        with pytest.raises(InputError, match="at least one state"):
            method.fit(run, [])
    with pytest.raises(InputError, match="batch size of 1"):
        GaussNewton(batch_size=0).fit(run, [state]).multiply(vectors_of(state))
    for wrong in (GaussNewton(0), Hessian(0), Diagonal(samples=0), Diagonal(batch_size=0), GaussNewton(examples=99)):
        with pytest.raises(InputError):
            wrong.fit(run, [state])
    for wrong in (Nystrom(60), Nystrom(0), Arnoldi(59, 58), Arnoldi(0, 1), Arnoldi(3, 0)):
        with pytest.raises(InputError):
            wrong.fit(run, [state])
    for method in (Nystrom(3, EKFAC()), Arnoldi(5, 3, EKFAC())):
        with pytest.raises(InputError, match="EKFAC has no products"):
            method.fit(run, [state])
    with pytest.raises(InputError, match="at least one id"):
        hessian_product(run, state, vectors_of(state), torch.tensor([], dtype=torch.int64))
    monkeypatch.setattr(products, "LARGEST_EXPLICIT", 58)
    for kind in (GaussNewton, Hessian):
        with pytest.raises(InputError, match="59 x 59 explicit; at most 58"):
            kind(None).fit(run, [state])


def test_nothing_is_left_behind(runs):
    run = runs["batchnorm"]
    model = run.update_map.model.train()
    model.zero_grad()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    random = torch.get_rng_state()
    for method in (GaussNewton(3), Hessian(3), Nystrom(3), Arnoldi(9, 3), Diagonal()):
        method.fit(run, [run.final_state]).apply(lambda s, mean: s + mean, vectors_of(run.final_state))
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert all(leaf.grad is None for leaf in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_single_precision():
    """Everything keeps the precision of the vectors, and spectra are float64."""
    model = CASE.model().float()
    data = (CASE.examples[0].float(), CASE.examples[1])
    run = record(model, data, Classification(), optimizer=torch.optim.SGD(model.parameters(), lr=0.2), epochs=2, batch_size=4)
    double = CASE.record(RULES["sgd"])
    state = run.final_state
    vectors = {name: leaf.float() for name, leaf in vectors_of(state).items()}
    same = replace(double.final_state, params={name: leaf.double() for name, leaf in state.params.items()})
    exact = GaussNewton(None).fit(double, [same])
    wide = {name: leaf.double() for name, leaf in vectors.items()}
    expected = exact.apply(lambda s, mean: 1 / (s + mean), wide)
    for method in (GaussNewton(40), GaussNewton(None), Nystrom(40)):
        found = method.fit(run, [state]).apply(lambda s, _: 1 / (s + exact.mean), vectors)
        assert all(leaf.dtype == torch.float32 for leaf in found.values())
        assert_close(matrix_of(found, vectors).double(), matrix_of(expected, vectors), 1e-4)
    assert isinstance(exact, ProductOperator)
    assert count(exact.like) == 59
