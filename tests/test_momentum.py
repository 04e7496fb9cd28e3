"""Momentum in games: polynomials against the Jacobian of the step, the stability criterion, and what tuning reaches."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from retrograd.dynamics import (
    FunctionFlow,
    convergence_rate,
    is_adversarially_stable,
    momentum_roots,
    spectrum,
    tune_extragradient,
    tune_momentum,
    tune_optimistic,
)
from retrograd.dynamics.momentum import companion
from retrograd.dynamics.tuning import largest_of_cubics, minimise
from retrograd.errors import InputError
from tests.cases import normal

ALPHA, BETA = cmath.rect(0.7, 0.4), cmath.rect(0.8, math.pi / 8)


def momentum_step(matrix: Tensor, alpha: complex, beta: complex, turns: tuple[slice, ...]) -> FunctionFlow:
    """The update in plain arithmetic on (Re μ, Im μ, w); the players of ``turns`` move one after the other."""
    size = len(matrix)

    def step(state: Tensor) -> Tensor:
        real, imaginary, w = state.split(size)
        for own in turns:
            g, mask = matrix @ w, torch.zeros(size, dtype=torch.float64)
            mask[own] = 1
            new_real = beta.real * real - beta.imag * imaginary - g
            new_imaginary = beta.imag * real + beta.real * imaginary
            real, imaginary = torch.lerp(real, new_real, mask), torch.lerp(imaginary, new_imaginary, mask)
            w = w + mask * (alpha.real * real - alpha.imag * imaginary)
        return torch.cat([real, imaginary, w])

    return FunctionFlow(step, 3 * size)


def distance(left: Tensor, right: Tensor) -> float:
    """How far each of ``left`` is from the nearest of ``right``, at most, and the other way round."""
    apart = (left[:, None] - right).abs()
    return max(apart.amin(1).max().item(), apart.amin(0).max().item())


def test_simultaneous_roots_are_the_eigenvalues_of_the_step():
    matrix = normal(4, 4, seed=0)
    flow = momentum_step(matrix, ALPHA, BETA, (slice(None),))
    found = spectrum(flow, torch.zeros(12, dtype=torch.float64)).values
    roots = torch.cat([momentum_roots(value, ALPHA, BETA) for value in torch.linalg.eigvals(matrix).tolist()])
    assert distance(found, roots) < 1e-10
    assert convergence_rate(torch.linalg.eigvals(matrix), ALPHA, BETA) == pytest.approx(found.abs().max().item(), abs=1e-10)


def test_alternating_roots_are_the_eigenvalues_of_a_round():
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[:2, 2:], matrix[2:, :2] = normal(2, 2, seed=1), -normal(2, 2, seed=1).T
    flow = momentum_step(matrix, ALPHA, BETA, (slice(0, 2), slice(2, 4)))
    found = spectrum(flow, torch.zeros(12, dtype=torch.float64)).values
    values = [value for value in torch.linalg.eigvals(matrix).tolist() if value.imag > 0]
    roots = torch.cat([momentum_roots(value, ALPHA, BETA, "alternating") for value in values])
    assert len(found) == len(roots) == 12
    assert distance(found, roots) < 1e-9


def test_the_criterion_agrees_with_the_roots():
    """Within 1e-3 of equality in (*) the α² term is below what α = 1e-3 resolves beside α⁴: those pairs are left out."""
    disagreements = compared = 0
    for size in torch.linspace(0.02, 0.98, 40, dtype=torch.float64).tolist():
        for angle in torch.linspace(0, math.pi, 41, dtype=torch.float64).tolist():
            beta = cmath.rect(size, angle)
            bound = (1 - beta.real) ** 2 * (1 + beta.real) / (3 - beta.real)
            if abs(beta.imag**2 - bound) < 1e-3:
                continue
            # The root that begins at 1, relative to 1 and in units of α²; α in proportion to the distance of the next root.
            step = 1e-3 * abs(1 - beta) ** 2
            root = convergence_root(step, beta)
            compared += 1
            disagreements += (root < 1) != is_adversarially_stable(beta)
    assert compared >= 1500
    assert disagreements == 0


def convergence_root(alpha: float, beta: complex) -> float:
    values = momentum_roots(1j, alpha, beta)
    return values[(values - 1).abs().argmin()].abs().item()


@pytest.mark.parametrize(
    ("alpha", "size", "angle", "updates", "rate"),
    [
        (0.028, 0.887, math.pi / 16, "simultaneous", 0.9638),
        (0.096, 0.806, math.pi / 8, "simultaneous", 0.9354),
        (0.300, 0.707, math.pi / 4, "simultaneous", 0.8994),
        (0.856, 0.674, math.pi / 2, "simultaneous", 0.8988),
        (1.817, -0.072, 0.0, "alternating", 0.4641),
    ],
)
def test_known_rates(alpha, size, angle, updates, rate):
    """Known to three digits, next to double roots, where rates move with the square root of the numbers: look around them."""

    def rates(points: Tensor) -> Tensor:
        return torch.tensor([convergence_rate([1j], a, cmath.rect(b, angle), updates) for a, b in points.tolist()])

    box = [alpha - 6e-4, size - 6e-4], [alpha + 6e-4, size + 6e-4]
    best = minimise(rates, *box, [5, 5], effort=0.15)
    assert rates(best[None]).item() == pytest.approx(rate, abs=1.5e-3)


def test_tuning_reaches_the_known_best_rates():
    assert tune_momentum([1j]).rate < 0.8886
    assert tune_momentum([1j], real_rate=False).rate < 0.76
    assert tune_momentum([1j], updates="alternating").rate < 0.345
    assert tune_optimistic([1j]).rate < 0.71
    assert tune_extragradient([1j]).rate < 0.8661


def test_tuning_to_cooperation_finds_polyak():
    condition = 25.0
    found = tune_momentum([1 / condition, 0.3, 1.0])
    expected = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    assert found.rate <= 1.01 * expected
    # A spectrum and its multiple need learning rates in inverse proportion.
    scaled = tune_momentum([10 / condition, 3.0, 10.0])
    assert scaled.rate == pytest.approx(found.rate, rel=1e-6)
    assert scaled.alpha == pytest.approx(found.alpha / 10, rel=1e-3)
    assert isinstance(found.alpha, float)


def test_tuning_is_close_to_a_search_with_more_effort():
    for seed in range(3):
        values = torch.polar(normal(6, seed=seed).exp(), math.pi / 2 * torch.sigmoid(normal(6, seed=seed + 10)))
        little, much = tune_momentum(values), tune_momentum(values, effort=10.0, seed=1)
        assert little.gradients_to_shrink() <= 1.05 * much.gradients_to_shrink()


def test_closed_form_cubics():
    coefficients = torch.complex(normal(200, 3, seed=3), normal(200, 3, seed=4))
    expected = torch.linalg.eigvals(companion(coefficients)).abs().amax(-1)
    torch.testing.assert_close(largest_of_cubics(coefficients), expected, rtol=1e-10, atol=1e-12)
    triple = torch.tensor([-3.0, 3.0, -1.0], dtype=torch.complex128)
    assert largest_of_cubics(triple).item() == pytest.approx(1, abs=1e-4)
    assert largest_of_cubics(torch.zeros(3, dtype=torch.complex128)).item() == 0
    assert minimise(lambda points: points.square().sum(1), [-1.0], [2.0], [5]).item() == pytest.approx(0, abs=1e-6)


def test_more_eigenvalues_than_needed():
    many = torch.polar(torch.linspace(0.01, 1, 300, dtype=torch.float64), torch.linspace(-1, 1, 300, dtype=torch.float64))
    found = tune_momentum(many)
    assert convergence_rate(many, found.alpha, found.beta) < 1


def test_refusals():
    with pytest.raises(InputError, match="finite eigenvalues"):
        tune_momentum([])
    with pytest.raises(InputError, match="not 0"):
        tune_momentum([0.0])
    with pytest.raises(InputError, match="below 1"):
        is_adversarially_stable(1.2)
