"""Solvers and spectra next to dense linear algebra."""

import math

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrograd.errors import InputError, NonFinite, SolverFailed
from retrograd.linalg import (
    apply_function,
    arnoldi,
    conjugate_gradients,
    diagonal,
    eigenpairs,
    lanczos,
    lissa,
    neumann,
    nystrom,
    orthonormalise,
    ritz_pairs,
    ritz_values,
    trace,
)

SIZE, QUERIES = 12, 3
seeds = st.integers(0, 2**16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def symmetric(eigenvalues, seed=0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return (vectors * eigenvalues) @ vectors.T


def positive(seed=0, size=SIZE):
    return symmetric(torch.linspace(0.5, 8.0, size), seed)


def product(matrix):
    return lambda rows: rows @ matrix.T


def never(_):
    raise AssertionError("no product is needed")


def function_of(matrix, function):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T


def assert_close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Conjugate gradients


@given(seeds)
def test_cg_equals_a_dense_solve(seed):
    matrix, right = positive(seed), normal(QUERIES, SIZE, seed=seed + 1)
    solution = conjugate_gradients(product(matrix), right, tolerance=1e-12)
    assert_close(solution.values, torch.linalg.solve(matrix, right.T).T)
    assert solution.converged.all()
    assert solution.residuals.max() <= 1e-12


def test_cg_iterates_equal_scipy():
    matrix, right = positive(), normal(1, SIZE)
    found = conjugate_gradients(product(matrix), right, iterations=4, tolerance=1e-15)
    expected, _ = scipy.sparse.linalg.cg(matrix.numpy(), right[0].numpy(), rtol=0.0, maxiter=4)
    assert_close(found.values[0], torch.from_numpy(expected))
    residual = torch.linalg.vector_norm(right - found.values @ matrix) / torch.linalg.vector_norm(right)
    assert_close(found.residuals[0], residual)
    assert (found.iterations, found.converged.tolist()) == (4, [False])


def test_cg_rows_do_not_influence_each_other():
    matrix = positive()
    # Rows that need one iteration (an eigenvector), many, and none, of very different lengths.
    right = torch.stack([torch.linalg.eigh(matrix).eigenvectors[:, 3], 1e-30 * normal(SIZE), torch.zeros(SIZE).double()])
    solution = conjugate_gradients(product(matrix), right, tolerance=1e-11)
    for row in range(len(right)):
        alone = conjugate_gradients(product(matrix), right[row : row + 1], tolerance=1e-11)
        scale = torch.linalg.vector_norm(alone.values).clamp(min=1e-300)
        assert_close(solution.values[row] / scale, alone.values[0] / scale)
    assert solution.converged.all()
    assert not solution.values[2].any()
    assert solution.residuals[2] == 0


def test_cg_small_gradients_in_float32_do_not_underflow():
    matrix, right = positive().float(), 1e-17 * normal(1, SIZE).float()
    solution = conjugate_gradients(product(matrix), right, tolerance=1e-5)
    assert_close(solution.values * 1e17, torch.linalg.solve(matrix, 1e17 * right.T).T, 1e-4)
    assert solution.values.dtype == torch.float32


def test_cg_with_the_exact_preconditioner_needs_one_iteration():
    matrix, right = positive(), normal(QUERIES, SIZE)
    plain = conjugate_gradients(product(matrix), right, tolerance=1e-10)
    exact = conjugate_gradients(product(matrix), right, tolerance=1e-10, preconditioner=product(torch.linalg.inv(matrix)))
    assert exact.iterations == 1 < plain.iterations
    assert_close(exact.values, torch.linalg.solve(matrix, right.T).T)


def test_cg_solves_singular_systems_that_have_a_solution():
    matrix = symmetric([0.0, 0.0, 1.0, 2.0, 3.0])
    right = normal(2, 5) @ matrix
    solution = conjugate_gradients(product(matrix), right, tolerance=1e-12)
    assert_close(solution.values, right @ torch.linalg.pinv(matrix), 1e-9)


def test_cg_names_the_query_with_negative_curvature():
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(SolverFailed, match=r"positive definite operator M, but x·Mx is -2 for query 1 after 0 .* Add damping"):
        conjugate_gradients(lambda rows: rows * torch.tensor([1.0, -2.0]), right)
    with pytest.raises(SolverFailed, match="positive definite preconditioner M"):
        conjugate_gradients(never, right, preconditioner=lambda rows: -rows)
    with pytest.raises(SolverFailed, match="x·Mx is nan for query 0"):
        conjugate_gradients(lambda rows: rows * math.nan, right)


# Neumann series and LiSSA


@given(seeds, st.integers(1, 30))
def test_neumann_equals_its_sum(seed, iterations):
    matrix, right, step = positive(seed), normal(QUERIES, SIZE, seed=seed + 1), 0.2
    shrink = torch.eye(SIZE).double() - step * matrix
    expected = step * sum(right @ torch.linalg.matrix_power(shrink, power) for power in range(iterations))
    solution = neumann(product(matrix), right, step=step, iterations=iterations)
    assert_close(solution.values, expected)
    norms = torch.linalg.vector_norm(right, dim=1)
    assert_close(solution.residuals, torch.linalg.vector_norm(right - expected @ matrix, dim=1) / norms)
    assert solution.iterations == iterations


@pytest.mark.parametrize("options", [{}, {"momentum": 0.6}, {"schedule": lambda j: 1 + 1 / (1 + j)}, {"precondition": True}])
def test_neumann_equals_its_recurrence_and_goes_to_the_solution(options):
    matrix, right, start = positive(), normal(QUERIES, SIZE), normal(QUERIES, SIZE, seed=1)
    approximate = torch.diag(1 / matrix.diagonal()) if options.pop("precondition", False) else torch.eye(SIZE).double()
    values, move = start, torch.zeros_like(start)
    for j in range(20):
        length = 0.1 * options.get("schedule", lambda j: 1.0)(j)
        move = options.get("momentum", 0.0) * move + length * (right - values @ matrix) @ approximate
        values = values + move
    given = dict(step=0.1, start=start, preconditioner=product(approximate), **options)
    assert_close(neumann(product(matrix), right, iterations=20, **given).values, values)
    solution = neumann(product(matrix), right, iterations=3000, tolerance=1e-12, **given)
    assert_close(solution.values, torch.linalg.solve(matrix, right.T).T)
    assert solution.iterations < 3000
    assert solution.converged.all()


def test_neumann_rows_do_not_influence_each_other():
    matrix, right, start = positive(), normal(QUERIES, SIZE), normal(QUERIES, SIZE, seed=1)
    right[1] = 0
    start[2] = torch.linalg.solve(matrix, right[2])
    options = dict(step=0.1, iterations=150, momentum=0.5, tolerance=1e-3)
    solution = neumann(product(matrix), right, start=start, **options)
    for row in range(QUERIES):
        alone = neumann(product(matrix), right[row : row + 1], start=start[row : row + 1], **options)
        assert_close(solution.values[row], alone.values[0])
    assert solution.converged.all()
    assert not solution.values[1].any()
    assert_close(solution.values[2], start[2])


def test_stopping_early_is_damping():
    eigenvalues, step, iterations = torch.tensor([1e-6, 1e-3, 1.0]).double(), 0.5, 100
    found = neumann(lambda rows: rows * eigenvalues, torch.ones(1, 3).double(), step=step, iterations=iterations).values[0]
    damped = 1 / (eigenvalues + 1 / (step * iterations))
    torch.testing.assert_close(found, damped, rtol=0.05, atol=0)


def test_lissa_averages_over_products_that_change():
    matrices = torch.stack([positive(seed) for seed in range(4)])
    right = normal(QUERIES, SIZE)
    expected = torch.linalg.solve(matrices.mean(dim=0), right.T).T
    seen = []

    def multiply(rows, iteration):
        seen.append(iteration)
        return rows @ matrices[iteration % 4]

    solution = lissa(multiply, right, step=0.1, iterations=4000, schedule=lambda j: 1 / (1 + j / 100))
    assert torch.linalg.vector_norm(solution.values - expected) < 0.02 * torch.linalg.vector_norm(expected)
    assert seen == list(range(1, 4001))  # at 0 the vectors are 0, and so are their products


@pytest.mark.parametrize(("eigenvalues", "step"), [([1.0, 8.0], 0.3), ([1.0, -1.0], 0.3), ([math.inf, 1.0], 0.1)])
def test_neumann_notices_divergence(eigenvalues, step):
    with pytest.raises(SolverFailed, match=rf"diverges: after \d+ of 500 .* query 1 is .* smaller than {step}, .* add damping"):
        neumann(
            lambda rows: torch.nan_to_num(rows * torch.tensor(eigenvalues), posinf=math.inf, neginf=-math.inf),
            torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
            step=step,
            iterations=500,
        )


# Lanczos


FUNCTIONS = {
    "exponential": lambda s: torch.exp(-0.3 * s),
    "inverse": lambda s: 1 / s,
    "segment": lambda s: -torch.expm1(-2 * s) / s,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seeds)
def test_functions_of_matrices_are_exact_in_the_whole_space(name, seed):
    matrix, vectors = positive(seed), normal(QUERIES, SIZE, seed=seed + 1)
    found = lanczos(product(matrix), vectors, SIZE).apply(FUNCTIONS[name])
    assert_close(found, vectors @ function_of(matrix, FUNCTIONS[name]))


@given(seeds, st.integers(1, SIZE))
def test_lanczos_is_a_projection(seed, steps):
    matrix, vectors = positive(seed), normal(QUERIES, SIZE, seed=seed + 1)
    space = lanczos(product(matrix), vectors, steps)
    for row in range(QUERIES):
        basis = space.basis[row]
        assert_close(basis @ basis.T, torch.eye(steps).double(), 1e-13)
        tridiagonal = space.diagonal[row].diag() + space.off_diagonal[row].diag(1) + space.off_diagonal[row].diag(-1)
        assert_close(basis @ matrix @ basis.T, tridiagonal, 1e-12)
    degree = steps - 1
    assert_close(space.apply(lambda s: s**degree), vectors @ torch.linalg.matrix_power(matrix, degree), 1e-9)


def test_few_steps_do_for_smooth_functions():
    matrix, vectors = positive(size=200), normal(QUERIES, 200)
    found = apply_function(product(matrix), vectors, FUNCTIONS["exponential"], steps=16)
    assert_close(found, vectors @ torch.linalg.matrix_exp(-0.3 * matrix))
    for row in range(QUERIES):
        alone = apply_function(product(matrix), vectors[row : row + 1], FUNCTIONS["exponential"], steps=16)
        assert_close(found[row], alone[0])


def test_exhausted_spaces_are_exact_and_never_divide_by_zero():
    # Indefinite, with a null space: 1/s is infinite at 0, which the start vectors have no share in.
    matrix = symmetric([0.0, 0.0, -1.0, 2.0, 2.0, 5.0])
    values, vectors = torch.linalg.eigh(matrix)
    order = values.argsort()
    low, two, other_two, high = (vectors[:, order[k]] for k in (0, 3, 4, 5))
    start = torch.stack([3 * high, low + two, two + other_two, torch.zeros(6).double(), low + two - high])
    space = lanczos(product(matrix), start, 6)
    assert space.dimensions.tolist() == [1, 2, 1, 0, 3]
    assert_close(space.apply(lambda s: 1 / s), start @ torch.linalg.pinv(matrix))
    assert_close(space.apply(torch.exp), start @ torch.linalg.matrix_exp(matrix))
    ritz, columns = space.ritz()
    assert_close(ritz[1, :2], torch.tensor([-1.0, 2.0]).double())
    assert not columns[1, :, 2:].any()
    assert_close(apply_function(torch.zeros_like, normal(2, 5), torch.cos, 4), normal(2, 5))
    assert_close(apply_function(lambda rows: 3 * rows, normal(2, 1), torch.square, 4), 9 * normal(2, 1))


def test_eigenpairs_equal_scipy():
    matrix = symmetric(normal(40))
    values, vectors = eigenpairs(product(matrix), normal(40, seed=1), steps=35, count=3)
    expected = scipy.sparse.linalg.eigsh(matrix.numpy(), k=3, which="LA", return_eigenvectors=False)
    assert_close(values, torch.from_numpy(expected[::-1].copy()))
    assert_close(vectors @ matrix, values[:, None] * vectors, 1e-7)
    assert_close(vectors @ vectors.T, torch.eye(3).double())


def test_eigenpairs_of_an_exhausted_space():
    start = torch.tensor([0.0, 2.0, 0.0])
    values, vectors = eigenpairs(lambda rows: rows * torch.tensor([1.0, -3.0, 7.0]), start, steps=3, count=1)
    assert_close(values, torch.tensor([-3.0]))
    assert_close(vectors.abs(), torch.tensor([[0.0, 1.0, 0.0]]))
    with pytest.raises(InputError, match=r"between 1 and 1, the dimension of this start vector's Krylov space, got 2\."):
        eigenpairs(lambda rows: rows * torch.tensor([1.0, -3.0, 7.0]), start, steps=3, count=2)


# Arnoldi


@given(seeds, st.integers(1, 2 * SIZE))
def test_arnoldi_satisfies_its_equation(seed, steps):
    matrix = normal(SIZE, SIZE, seed=seed)
    basis, hessenberg = arnoldi(product(matrix), normal(SIZE, seed=seed + 1), steps)
    rank = min(steps, SIZE)
    assert basis.shape == (rank + 1, SIZE)
    assert hessenberg.shape == (rank + 1, rank)
    assert_close(matrix @ basis[:-1].T, basis.T @ hessenberg)
    assert_close(basis[:rank] @ basis[:rank].T, torch.eye(rank).double(), 1e-13)
    assert not hessenberg.tril(-2).any()


@given(seeds)
def test_ritz_pairs_of_the_whole_space_are_eigenpairs(seed):
    matrix = normal(SIZE, SIZE, seed=seed)
    values, vectors = ritz_pairs(*arnoldi(product(matrix), normal(SIZE, seed=seed + 1), SIZE))
    expected = torch.linalg.eigvals(matrix)
    assert_close(values.abs(), expected.abs().sort(descending=True).values, 1e-8)
    assert (values[:, None] - expected).abs().amin(dim=1).max() < 1e-8
    assert_close(vectors @ matrix.T.to(vectors), values[:, None] * vectors, 1e-8)
    assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(SIZE).double())


def test_largest_ritz_values_equal_scipy():
    matrix = normal(60, 60) + torch.diag(torch.linspace(0, 30, 60)).double()
    expected = scipy.sparse.linalg.eigs(matrix.numpy(), k=2, which="LM", return_eigenvectors=False)
    _, hessenberg = arnoldi(product(matrix), normal(60, seed=1), 45)
    assert_close(ritz_values(hessenberg)[:2].abs(), torch.from_numpy(abs(expected)).sort(descending=True).values, 1e-8)


def test_arnoldi_stops_when_the_space_is_exhausted():
    matrix = torch.block_diag(torch.tensor([[0.0, -2.0], [2.0, 0.0]]), 5 * torch.eye(2)).double()
    basis, hessenberg = arnoldi(product(matrix), torch.tensor([1.0, 1.0, 0.0, 0.0]).double(), 4)
    assert hessenberg.shape == (3, 2)
    assert not basis[2].any()
    assert not hessenberg[2].any()
    assert_close(ritz_values(hessenberg), torch.tensor([2j, -2j], dtype=torch.complex128))
    assert arnoldi(torch.zeros_like, normal(4), 3)[1].tolist() == [[0.0], [0.0]]


# Nyström


@given(seeds, st.integers(0, SIZE))
def test_nystrom_is_exact_up_to_its_rank(seed, rank):
    eigenvalues = torch.cat([torch.linspace(0.1, 9.0, SIZE)[:rank], torch.zeros(SIZE - rank)]).double()
    matrix = symmetric(eigenvalues, seed)
    for wanted in {max(rank, 1), min(rank + 2, SIZE), SIZE}:
        values, vectors = nystrom(product(matrix), SIZE, wanted, generator=generator(seed), dtype=torch.float64)
        assert_close((vectors * values) @ vectors.T, matrix, 1e-8)
        assert_close(values[:rank], eigenvalues[:rank].flip(0), 1e-8)
        assert_close(vectors.T @ vectors, torch.eye(wanted).double())
        assert (values.diff() <= 0).all()
        assert (values >= 0).all()


def test_nystrom_equals_its_formula_and_is_below_the_operator():
    matrix = symmetric(0.5 ** torch.arange(SIZE))
    values, vectors = nystrom(product(matrix), SIZE, 5, generator=generator(), dtype=torch.float64)
    test = normal(SIZE, 5)  # what the generator draws
    sketch = matrix @ test
    assert_close((vectors * values) @ vectors.T, sketch @ torch.linalg.solve(test.T @ sketch, sketch.T), 1e-9)
    assert torch.linalg.eigvalsh(matrix - (vectors * values) @ vectors.T).min() > -1e-12
    again = nystrom(product(matrix), SIZE, 5, generator=generator(), dtype=torch.float64)
    assert torch.equal(again[0], values)


def test_nystrom_takes_inexact_products_but_no_negative_eigenvalues():
    matrix = symmetric([4.0, 2.0, 0.0, 0.0, 0.0, -1e-10])
    values, _ = nystrom(product(matrix), 6, 6, generator=generator(), dtype=torch.float64)
    assert_close(values, torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0, 0.0]).double(), 1e-8)
    with pytest.raises(SolverFailed, match=r"x·Ax < 0\. Add damping"):
        nystrom(product(symmetric([4.0, 2.0, -1.0])), 3, 3, generator=generator(), dtype=torch.float64)


# Hutchinson


@pytest.mark.parametrize("estimator", [trace, diagonal])
def test_hutchinson_equals_the_mean_over_its_probes(estimator):
    matrix, probes = normal(SIZE, SIZE), 21
    found = estimator(product(matrix), SIZE, probes=probes, generator=generator(), dtype=torch.float64)
    draw = generator()
    signs = torch.stack([2.0 * torch.randint(0, 2, (SIZE,), generator=draw) - 1 for _ in range(probes)]).double()
    samples = signs * (signs @ matrix.T)
    samples = samples.sum(dim=1) if estimator is trace else samples
    assert_close(found.value, samples.mean(dim=0))
    assert_close(found.standard_error, samples.std(dim=0) / probes**0.5)
    batches = estimator(product(matrix), SIZE, probes=probes, generator=generator(), dtype=torch.float64, batch_size=4)
    assert_close(batches.value, found.value)
    assert_close(batches.standard_error, found.standard_error)


def test_hutchinson_errors_are_as_large_as_they_say():
    matrix, probes = positive(), 4000
    options = dict(probes=probes, generator=generator(), dtype=torch.float64, batch_size=1000)
    off = matrix - matrix.diagonal().diag()
    for found, exact, variance in (
        (trace(product(matrix), SIZE, **options), matrix.trace(), 2 * off.square().sum()),
        (diagonal(product(matrix), SIZE, **options), matrix.diagonal(), off.square().sum(dim=1)),
    ):
        assert ((found.value - exact).abs() < 4 * found.standard_error).all()
        torch.testing.assert_close(found.standard_error, (variance / probes).sqrt(), rtol=0.1, atol=0)


def test_hutchinson_is_exact_for_diagonal_operators():
    numbers = normal(SIZE)
    options = dict(probes=3, generator=generator(), dtype=torch.float64)
    found = diagonal(lambda rows: rows * numbers, SIZE, **options)
    assert_close(found.value, numbers)
    assert not found.standard_error.any()
    assert_close(trace(lambda rows: rows * numbers, SIZE, **options).value, numbers.sum())


# Orthonormal rows


@given(seeds, st.integers(1, SIZE))
def test_orthonormalise_equals_gram_schmidt(seed, count):
    vectors = normal(count, SIZE, seed=seed)
    rows, upper = orthonormalise(vectors)
    assert_close(upper.T @ rows, vectors)
    assert_close(rows @ rows.T, torch.eye(count).double(), 1e-13)
    assert_close(upper.T, torch.linalg.cholesky(vectors @ vectors.T), 1e-8)
    assert (upper.diagonal() > 0).all()
    assert not upper.tril(-1).any()


def test_orthonormalise_completes_dependent_vectors():
    vectors = normal(5, SIZE)
    vectors[1] = 0
    vectors[3] = 1e-100 * (vectors[0] - 2 * vectors[2])
    vectors[4] *= 1e-100  # short, but independent
    rows, upper = orthonormalise(vectors)
    assert (upper.diagonal() == 0).tolist() == [False, True, False, True, False]
    assert_close(rows @ rows.T, torch.eye(5).double(), 1e-13)
    assert_close(upper.T @ rows, vectors)


def test_orthonormalise_gives_the_lyapunov_exponents_of_a_linear_map():
    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [0.0, 0.0, 0.0]]).double()
    rows, total = orthonormalise(normal(3, 3))[0], torch.zeros(3).double()
    for _ in range(200):
        rows, upper = orthonormalise(rows @ matrix.T)
        total += upper.diagonal().log()
    assert_close(total[:2] / 200, torch.tensor([2.0, 0.5]).double().log(), 2e-2)
    assert total[2] == -math.inf


# What all have in common


def test_float32_stays_float32():
    matrix, right = positive().float(), normal(QUERIES, SIZE).float()
    options = dict(generator=generator(), dtype=torch.float32)
    found = [
        (conjugate_gradients(product(matrix), right, tolerance=1e-5).values, torch.linalg.solve(matrix, right.T).T),
        (neumann(product(matrix), right, step=0.2, iterations=200).values, torch.linalg.solve(matrix, right.T).T),
        (apply_function(product(matrix), right, torch.exp, SIZE) / 1e3, right @ torch.linalg.matrix_exp(matrix) / 1e3),
        (eigenpairs(product(matrix), right[0], SIZE, 1)[0], torch.linalg.eigvalsh(matrix)[-1:]),
        (ritz_pairs(*arnoldi(product(matrix), right[0], SIZE))[0].real.float(), torch.linalg.eigvalsh(matrix).flip(0)),
        (nystrom(product(matrix), SIZE, SIZE, **options)[0], torch.linalg.eigvalsh(matrix).flip(0)),
    ]
    for one, expected in found:
        assert_close(one, expected, 1e-3)
    assert ritz_pairs(*arnoldi(product(matrix), right[0], 4))[1].dtype == torch.complex64
    assert trace(product(matrix), SIZE, probes=2, **options).value.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: conjugate_gradients(never, v, tolerance=0.0), "must be positive, got 0.0 and 100"),
        (lambda v: conjugate_gradients(never, v, iterations=0), "must be positive, got 1e-06 and 0"),
        (lambda v: neumann(never, v, step=-1.0, iterations=1), "step and iterations must be positive"),
        (lambda v: neumann(never, v, step=1.0, iterations=1, momentum=1.0), "momentum at least 0 and below 1"),
        (lambda v: lanczos(never, v, 0), "steps must be at least 1, got 0"),
        (lambda v: arnoldi(never, v[0], 0), "steps must be at least 1, got 0"),
        (lambda v: arnoldi(never, 0 * v[0], 1), "the start vector is 0"),
        (lambda v: eigenpairs(never, 0 * v[0], 3, 1), "between 1 and 0"),
        (lambda v: nystrom(never, 4, 5, generator=generator()), "between 1 and the number of parameters, 4, got 5"),
        (lambda v: trace(never, 4, probes=1, generator=generator()), "at least 2 probes .* got probes=1"),
        (lambda v: diagonal(never, 4, probes=2, generator=generator(), batch_size=0), "batch_size=0"),
        (lambda v: orthonormalise(normal(3, 2)), "3 vectors of 2 numbers .* at most 2"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(normal(2, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda v: conjugate_gradients(never, v),
        lambda v: neumann(never, v, step=1.0, iterations=1),
        lambda v: lanczos(never, v, 2),
        lambda v: lanczos(lambda rows: rows * math.nan, torch.ones_like(v), 2),
        lambda v: arnoldi(lambda rows: rows * math.inf, torch.ones_like(v[1]), 2),
        lambda v: nystrom(lambda rows: rows * math.nan, 4, 2, generator=generator()),
        lambda v: orthonormalise(v),
    ],
)
def test_what_is_not_finite_is_named(call):
    vectors = normal(2, 4)
    vectors[1, 2] = math.nan
    with pytest.raises(NonFinite, match=r"vector [01] is not finite"):
        call(vectors)
