"""Momentum with complex factors near an equilibrium of a game: how fast it converges, and which numbers make it fastest.

    μ' = β μ − g(w)        w' = w + Re(α μ')        g ≈ J (w − w*)

α, β       learning rate and momentum, complex numbers, |β| < 1; real ones are ordinary (positive or negative) momentum;
λ          eigenvalues of the game's Jacobian J = ∂g/∂w at the equilibrium (Ritz values will do): real ones for what the players
           want in common, imaginary ones for rotation;
x          eigenvalues of the step on (Re μ, Im μ, w): the rate is the largest |x|, and convergence is local if it is below 1.

All players at once: for each λ the three roots of

    (x − 1) D(x) + λ x N(x) = 0        D = x² − 2 Re β x + |β|²,   N = Re α x − Re(α β̄)                                (SIM)

Two players in turns, each with its own buffer, where the players' own second derivatives vanish, J = [[0, B], [C, 0]], as in
bilinear games: for each pair ±λ the six roots of

    (x − 1)² D(x)² − λ² x³ N(x)² = 0                                                                                   (ALT)

With real, small α and imaginary λ, second-order perturbation of the root at 1 (own derivation) says when (SIM) converges:

    (Im β)² > (1 − Re β)² (1 + Re β) / (3 − Re β)                                                                      (*)

Assumptions: the numbers hold near the equilibrium and without noise. The rate is asymptotic: where x is nearly a double root,
there are long transients. Tuning to a spectrum moves the iterates elsewhere, so measure the spectrum again. What was tuned is
the best of a search, not a proven optimum. Cost: closed forms; some ten thousand polynomials per eigenvalue for tuning.

References: Lorraine, Acuna, Vicol, Duvenaud (2022), "Complex momentum for optimization in games", AISTATS, arXiv 2102.08431;
Gidel et al. (2019), "Negative momentum for improved game dynamics". The closed form (*) is our own.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Complex
from torch import Tensor

from retrograd.dynamics.tuning import Tuned, largest_of_cubics, minimise, spectrum_to_tune
from retrograd.errors import InputError

Updates = Literal["simultaneous", "alternating"]
Number = float | complex


def momentum_roots(
    eigenvalue: Number, alpha: Number, beta: Number, updates: Updates = "simultaneous"
) -> Complex[Tensor, " root"]:
    """Return the eigenvalues x of a step that belong to one eigenvalue λ of the game's Jacobian, the largest modulus first.

    Args:
        eigenvalue: λ.
        alpha: learning rate.
        beta: momentum.
        updates: ``"simultaneous"``: three roots of (SIM); ``"alternating"``: six of (ALT), for λ and −λ together.

    Raises:
        InputError: there are no such updates.

    Gradient descent without momentum has 1 − αλ, and two zeros:

    >>> momentum_roots(1.0, 0.25, 0.0).abs()
    tensor([0.7500, 0.0000, 0.0000], dtype=torch.float64)
    """
    values = torch.as_tensor(complex(eigenvalue), dtype=torch.complex128)
    roots = torch.linalg.eigvals(companion(_polynomial(values, _complex(alpha), _complex(beta), updates)))
    return roots[roots.abs().argsort(descending=True)] + 0.0


def convergence_rate(
    eigenvalues: Tensor | Sequence[Number], alpha: Number, beta: Number, updates: Updates = "simultaneous"
) -> float:
    """Return the largest modulus of a root over all eigenvalues: errors shrink by it in each step, if it is below 1.

    Args:
        eigenvalues: λ of the game's Jacobian.
        alpha: learning rate.
        beta: momentum.
        updates: who moves when.

    Raises:
        InputError: there is no eigenvalue, or there are no such updates.

    On one imaginary eigenvalue a complex momentum converges, and no real one does:

    >>> import cmath
    >>> round(convergence_rate([1j], 0.3, cmath.rect(0.707, cmath.pi / 4)), 3)
    0.906
    >>> convergence_rate([1j], 0.1, 0.9) > 1
    True
    """
    values = spectrum_to_tune(eigenvalues, reduce=False)
    roots = torch.linalg.eigvals(companion(_polynomial(values, _complex(alpha), _complex(beta), updates)))
    return roots.abs().max().item()


def is_adversarially_stable(beta: Number) -> bool:
    """Whether momentum β converges on every purely adversarial game for all small enough learning rates: criterion (*).

    Purely adversarial: all eigenvalues of the Jacobian are imaginary. The players move at once, and α is real.

    Args:
        beta: momentum, of modulus below 1.

    Raises:
        InputError: the modulus of β is not below 1.

    >>> import cmath
    >>> [is_adversarially_stable(beta) for beta in (0.9, -0.3, cmath.rect(0.8, cmath.pi / 8), cmath.rect(0.7, cmath.pi / 8))]
    [False, False, True, False]
    """
    beta = complex(beta)
    if not abs(beta) < 1:
        raise InputError(f"momentum must have a modulus below 1, got {abs(beta):.6g}.")
    return beta.imag**2 > (1 - beta.real) ** 2 * (1 + beta.real) / (3 - beta.real)


def tune_momentum(
    ritz_values: Tensor | Sequence[Number],
    *,
    updates: Updates = "simultaneous",
    real_rate: bool = True,
    effort: float = 1.0,
    seed: int = 0,
) -> Tuned:
    """Return learning rate and momentum that converge fastest on a spectrum.

    Args:
        ritz_values: eigenvalues of the game's Jacobian J (not of a step), such as Ritz values; of a complex pair one is enough.
        updates: who moves when.
        real_rate: keep α real, as published; else its argument is tuned, too, which helps on strong rotation.
        effort: factor on the number of settings looked at.
        seed: of the search.

    Returns:
        ``alpha`` (a float for a real rate), ``beta`` and ``rate``. A rate of 1 or more: nothing that was found converges.

    Raises:
        InputError: there is no eigenvalue but 0, or one is not finite.

    >>> found = tune_momentum([1j])
    >>> found.rate < 0.889 and is_adversarially_stable(found.beta)
    True
    """
    values = spectrum_to_tune(ritz_values)
    scale = values.abs().max().item()
    # log(α scale), and |β| as −log(1 − |β|), so that momentum close to 1 is resolved; arg β in [0, π] by symmetry, then arg α.
    lower, upper = [math.log(1e-4), 0.0, 0.0, -math.pi], [math.log(30.0), math.log(1e4), math.pi, math.pi]
    sizes = [20, 10, 12, 1] if real_rate else [12, 7, 8, 8]
    dims = 3 if real_rate else 4

    def numbers(points: Tensor) -> tuple[Tensor, Tensor]:
        sizes = torch.exp(points[:, 0]) / scale
        angles = torch.zeros_like(sizes) if real_rate else points[:, 3]
        return torch.polar(sizes, angles), torch.polar(-torch.expm1(-points[:, 1]), points[:, 2])

    def log_rate(points: Tensor) -> Tensor:
        alpha, beta = (part[:, None] for part in numbers(points))
        coefficients = _polynomial(values[None], alpha, beta, updates)
        if updates == "simultaneous":
            largest = largest_of_cubics(coefficients)
        else:
            largest = torch.linalg.eigvals(companion(coefficients)).abs().amax(-1)
        return largest.amax(1).clamp(min=1e-300).log()

    # With more numbers, or more roots that can coincide, there are more valleys.
    effort *= 1 if real_rate and updates == "simultaneous" else 4
    point = minimise(log_rate, lower[:dims], upper[:dims], sizes[:dims], effort=effort, seed=seed)
    alpha, beta = (part.item() for part in numbers(point[None]))
    rate = convergence_rate(values, alpha, beta, updates)
    return Tuned(rate, 1, {"alpha": alpha.real if real_rate else alpha, "beta": beta})


def _polynomial(eigenvalues: Tensor, alpha: Tensor, beta: Tensor, updates: Updates) -> Tensor:
    """Return the coefficients of (SIM) or (ALT) below the leading 1, the highest power first; shapes are broadcast."""
    twice, square = 2 * beta.real, beta.abs() ** 2
    first, last = alpha.real, (alpha * beta.conj()).real
    # (x − 1) D and x N
    left = [-1 - twice, square + twice, -square]
    if updates == "simultaneous":
        right = [eigenvalues * first, -eigenvalues * last, 0 * eigenvalues]
        return torch.stack(torch.broadcast_tensors(*(a + b for a, b in zip(left, right, strict=True))), dim=-1)
    if updates != "alternating":
        raise InputError(f'updates must be "simultaneous" or "alternating", got {updates!r}.')
    a, b, c = left
    squared = [2 * a, a * a + 2 * b, 2 * c + 2 * a * b, b * b + 2 * a * c, 2 * b * c, c * c]
    force = eigenvalues**2
    pull = [force * first**2, -2 * force * first * last, force * last**2]  # λ² N², times x³: x⁵, x⁴, x³
    rest = [squared[0] - pull[0], squared[1] - pull[1], squared[2] - pull[2], *(part + 0 * force for part in squared[3:])]
    return torch.stack(torch.broadcast_tensors(*rest), dim=-1)


def companion(coefficients: Complex[Tensor, "*polynomial degree"]) -> Complex[Tensor, "*polynomial degree degree"]:
    """Return the matrices whose eigenvalues are the roots of xⁿ + c₁ xⁿ⁻¹ + … + cₙ.

    >>> torch.linalg.eigvals(companion(torch.tensor([-3.0, 2.0], dtype=torch.complex128))).real.round(decimals=9).sort().values
    tensor([1., 2.], dtype=torch.float64)
    """
    degree = coefficients.shape[-1]
    matrix = torch.diag(coefficients.new_ones(degree - 1), -1).expand(*coefficients.shape[:-1], -1, -1).clone()
    matrix[..., 0, :] = -coefficients
    return matrix


def _complex(number: Number) -> Tensor:
    return torch.as_tensor(complex(number), dtype=torch.complex128)
