"""Step sizes that converge fastest on a spectrum: the search, and the two usual methods for games, tuned as carefully.

    minimise over the method's numbers    max_λ max |x(λ)|        x(λ): eigenvalues of the method's step for λ of the Jacobian

Extragradient with its own extrapolation step e, and heavy ball m:

    w̃ = w − e g(w),   w⁺ = w − a g(w̃) + m (w − w₋)             x² − (1 + m − a λ (1 − e λ)) x + m = 0                  (EG)

Optimistic gradient in its general form, and heavy ball:

    w⁺ = w − (a + b) g(w) + b g(w₋) + m (w − w₋)                x² − (1 + m − (a + b) λ) x + m − b λ = 0               (OG)

The search: a grid, whose best points become the population of a differential evolution: steps are differences of points, so
that they stretch along the valleys of this objective, which has kinks wherever another λ takes over. Everything is evaluated at
once, as tensors. Deterministic for a seed. The best of what it saw, no proof.

Assumptions and limits: see ``momentum.py``. Complex momentum takes one gradient a step, (OG) too, (EG) two.

References: Korpelevich (1976), "The extragradient method"; Mokhtari, Ozdaglar, Pattathil (2020), "A unified analysis of
extra-gradient and optimistic gradient methods"; Storn and Price (1997), "Differential evolution".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from retrograd.errors import InputError

_POPULATION, _GENERATIONS, _MOST = 48, 80, 64
_TURN = complex(-0.5, math.sqrt(3) / 2)  # a third of a full turn


@dataclass(frozen=True)
class Tuned:
    """The best numbers found for one method.

    Attributes:
        rate: errors shrink by this factor in each step; at 1 or above nothing that was found converges.
        gradients: gradients taken in each step.
        numbers: the method's numbers by name.
    """

    rate: float
    gradients: int
    numbers: dict[str, float | complex]

    @property
    def alpha(self) -> float | complex:
        """Learning rate (``numbers["alpha"]``)."""
        return self.numbers["alpha"]

    @property
    def beta(self) -> float | complex:
        """Momentum (``numbers["beta"]``)."""
        return self.numbers["beta"]

    def gradients_to_shrink(self, factor: float = 1e-8) -> float:
        """Return how many gradients shrink an error by ``factor``, once transients are over; infinite if none do.

        >>> round(Tuned(rate=0.1, gradients=2, numbers={}).gradients_to_shrink(1e-8))
        16
        """
        return self.gradients * math.log(factor) / math.log(self.rate) if self.rate < 1 else math.inf


def tune_extragradient(eigenvalues: Tensor | Sequence[float | complex], *, effort: float = 1.0, seed: int = 0) -> Tuned:
    """Return the numbers with which extragradient with heavy ball (EG) converges fastest on a spectrum.

    Args:
        eigenvalues: λ of the game's Jacobian.
        effort: factor on the number of settings looked at.
        seed: of the search.

    Returns:
        ``step`` a, ``extrapolation`` e, ``momentum`` m, and the rate.

    Raises:
        InputError: there is no eigenvalue but 0, or one is not finite.

    One imaginary eigenvalue, where plain extragradient at best reaches √3 / 2:

    >>> tune_extragradient([1j]).rate < 0.8661
    True
    """

    def roots(values: Tensor, step: Tensor, extrapolation: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + momentum - step * values * (1 - extrapolation * values), momentum + 0 * values

    return _tune(eigenvalues, roots, ("step", "extrapolation", "momentum"), 2, effort, seed)


def tune_optimistic(eigenvalues: Tensor | Sequence[float | complex], *, effort: float = 1.0, seed: int = 0) -> Tuned:
    """Return the numbers with which optimistic gradient with heavy ball (OG) converges fastest on a spectrum.

    Args:
        eigenvalues: λ of the game's Jacobian.
        effort: factor on the number of settings looked at.
        seed: of the search.

    Returns:
        ``step`` a, ``correction`` b, ``momentum`` m, and the rate.

    Raises:
        InputError: there is no eigenvalue but 0, or one is not finite.

    One imaginary eigenvalue, where plain optimistic gradient (a = b, m = 0) at best reaches 1 / √2:

    >>> tune_optimistic([1j]).rate < 0.71
    True
    """

    def roots(values: Tensor, step: Tensor, correction: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + momentum - (step + correction) * values, momentum - correction * values

    return _tune(eigenvalues, roots, ("step", "correction", "momentum"), 1, effort, seed)


def _tune(
    eigenvalues: Tensor | Sequence[float | complex],
    quadratic: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    names: tuple[str, str, str],
    gradients: int,
    effort: float,
    seed: int,
) -> Tuned:
    values = spectrum_to_tune(eigenvalues)
    scale = values.abs().max().item()

    def numbers(points: Tensor) -> list[Tensor]:
        return [points[:, 0].exp() / scale, points[:, 1].exp() / scale, torch.tanh(points[:, 2])]

    def log_rate(points: Tensor) -> Tensor:
        own = [part[:, None] for part in numbers(points)]
        total, product = quadratic(values[None], *own)  # of the two roots
        root = torch.sqrt(total**2 - 4 * product)
        return torch.maximum((total + root).abs(), (total - root).abs()).amax(1).div(2).clamp(min=1e-300).log()

    lower, upper = [math.log(1e-4), math.log(1e-4), -3.8], [math.log(30.0), math.log(300.0), 3.8]
    point = minimise(log_rate, lower, upper, [16, 16, 10], effort=effort, seed=seed)
    found = [part.item() for part in numbers(point[None])]
    return Tuned(math.exp(log_rate(point[None]).item()), gradients, dict(zip(names, found, strict=True)))


def spectrum_to_tune(eigenvalues: Tensor | Sequence[float | complex], reduce: bool = True) -> Complex[Tensor, " value"]:
    """Return eigenvalues as a complex vector; those that need to be looked at only, with ``reduce``.

    Of a pair of conjugates one is enough; of more than 64 the 64 that lie furthest from each other.

    Raises:
        InputError: there is none but 0, or one is not finite.
    """
    values = torch.as_tensor(eigenvalues).flatten().to(torch.complex128)
    if len(values) == 0 or not values.isfinite().all() or values.abs().max() == 0:
        raise InputError(
            f"tuning needs finite eigenvalues of the game's Jacobian, at least one of them not 0; got {len(values)} of which "
            f"{int(values.isfinite().sum())} are finite."
        )
    if not reduce:
        return values
    values = torch.complex(values.real, values.imag.abs())
    values = torch.unique(torch.view_as_real(values.clone()), dim=0)
    values = torch.view_as_complex(values.contiguous())
    if len(values) <= _MOST:
        return values
    # In a logarithmic metric, as rates differ by orders of magnitude.
    places = torch.stack([values.abs().clamp(min=1e-300).log(), values.angle()], dim=1)
    chosen = [int(places[:, 0].argmax())]
    far = (places - places[chosen[0]]).norm(dim=1)
    while len(chosen) < _MOST:
        chosen.append(int(far.argmax()))
        far = torch.minimum(far, (places - places[chosen[-1]]).norm(dim=1))
    return values[chosen]


def minimise(
    objective: Callable[[Float[Tensor, "point number"]], Float[Tensor, " point"]],
    lower: Sequence[float],
    upper: Sequence[float],
    sizes: Sequence[int],
    *,
    effort: float = 1.0,
    seed: int = 0,
) -> Float[Tensor, " number"]:
    """Return the best point found in a box.

    Args:
        objective: evaluates many points at once.
        lower: lower bounds.
        upper: upper bounds.
        sizes: points of the grid along each axis.
        effort: factor on population and generations together.
        seed: of the search.

    >>> minimise(lambda points: (points - 0.3).abs().sum(1), [0.0, -1.0], [1.0, 1.0], [4, 4]).round(decimals=4)
    tensor([0.3000, 0.3000], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)
    axes = [a + (b - a) * (torch.arange(n, dtype=torch.float64) + 0.5) / n for a, b, n in zip(low, high, sizes, strict=True)]
    points = torch.cartesian_prod(*axes).reshape(-1, len(sizes))
    values = objective(points).nan_to_num(nan=math.inf)
    size = min(len(points), round(_POPULATION * math.sqrt(effort)))
    # Half of them the best, half the best of groups drawn at random: the best alone often lie in one valley.
    order = values.argsort()
    best, rest = order[: size - size // 2], order[size - size // 2 :]
    groups = rest[torch.randperm(len(rest), generator=generator)].tensor_split(size // 2) if size // 2 else ()
    chosen = torch.cat([best, *(group[values[group].argmin()][None] for group in groups if len(group))])
    points, values, size = points[chosen], values[chosen], len(chosen)
    for _ in range(round(_GENERATIONS * math.sqrt(effort))):
        first, second, guide = torch.randint(0, size, (3, size), generator=generator)
        # Towards one of the best few, and along the difference of two others.
        leaders = values.argsort()[: max(size // 6, 2)]
        leader = points[leaders[guide % len(leaders)]]
        weight = 0.3 + 0.6 * torch.rand(size, 1, generator=generator, dtype=torch.float64)
        trial = points + weight * (leader - points) + weight * (points[first] - points[second])
        cross = torch.rand(trial.shape, generator=generator, dtype=torch.float64) < 0.9
        trial = torch.where(cross, trial, points)
        outside = (trial < low) | (trial > high)
        trial = torch.where(outside, (points + trial.clamp(low, high)) / 2, trial)
        found = objective(trial).nan_to_num(nan=math.inf)
        better = found < values
        points, values = torch.where(better[:, None], trial, points), torch.where(better, found, values)
    return points[values.argmin()]


def largest_of_cubics(coefficients: Complex[Tensor, "*polynomial 3"]) -> Float[Tensor, "*polynomial"]:
    """Return the largest modulus of a root of x³ + a x² + b x + c, by Cardano's formula and one step of Newton's.

    Of a double root only half of the digits are right, as its coefficients do not hold more.

    >>> largest_of_cubics(torch.tensor([-6.0, 11.0, -6.0], dtype=torch.complex128))    # roots 1, 2 and 3
    tensor(3., dtype=torch.float64)
    """
    a, b, c = coefficients.unbind(-1)
    shift = a / 3
    p, q = b - a * shift, c + shift * (2 * shift * shift - b)
    root = torch.sqrt(q * q / 4 + p * p * p / 27)
    # Of the two signs the one that does not cancel.
    plus, minus = -q / 2 + root, -q / 2 - root
    cube = torch.where(plus.abs() >= minus.abs(), plus, minus)
    first = torch.where(cube == 0, cube, torch.pow(cube, 1 / 3))
    safe = torch.where(first == 0, 1.0, first)
    largest = torch.zeros_like(a.real)
    for turn in (1.0, _TURN, _TURN.conjugate()):
        own = first * turn
        x = own - torch.where(first == 0, 0.0, p / (3 * safe * turn)) - shift
        slope = (3 * x + 2 * a) * x + b
        move = torch.where(slope == 0, 0.0, (((x + a) * x + b) * x + c) / torch.where(slope == 0, 1.0, slope))
        # Next to a double root Newton's step may jump.
        x = torch.where(move.abs() < 1e-3 * (1 + x.abs()), x - move, x)
        largest = torch.maximum(largest, x.abs())
    return largest
