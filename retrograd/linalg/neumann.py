"""Solve A v = q by a damped fixed-point iteration: the Neumann series, and LiSSA where products are stochastic.

    d ← β d + α_j P⁻¹ (q − A_j v),    v ← v + d            α_j = step · schedule(j),  β = momentum

Started at 0 and without momentum, preconditioner, schedule and noise, this is the series

    v_J = α Σ_{j<J} (I − αA)^j q  =  (I − (I − αA)^J) A⁻¹ q.

q, v       right-hand side and solution, rows of [query, P];
P          the preconditioner, an approximation of A that is easy to invert;
A_j        A, or in LiSSA an unbiased estimate of it, such as the curvature of a mini-batch drawn for iteration j.

**Stopping early is damping.** Along an eigenvector of A with eigenvalue λ the result is (1 − (1 − αλ)^J)/λ in place of 1/λ:
directions with λ ≫ 1/(αJ) are solved, those with λ ≪ 1/(αJ) get αJ. That is nearly the solution for A + ρI with ρ = 1/(αJ)
(with momentum (1 − β)/(αJ)), in addition to damping in A itself. So J is part of what is computed, not just of its cost.

Assumptions: the eigenvalues of P⁻¹A are above 0 and below 2(1 + β)/α. Otherwise the iteration diverges, which is noticed when
the residual of a row is 10⁴ times where it began (preconditioned residuals may grow before they fall) or is not finite;
slower growth shows only in the ``residuals`` of the solution. With noise v does not settle but fluctuates about A⁻¹q, less
with a smaller α: let ``schedule`` fall, or average several runs.
Cost: one product an iteration, in LiSSA of a mini-batch, and one in the end for the residual. Memory: four vectors a
right-hand side.

References: Agarwal, Bullins & Hazan (2017), "Second-order stochastic optimization for machine learning in linear time"; Koh &
Liang (2017), "Understanding black-box predictions via influence functions"; Lorraine, Vicol & Duvenaud (2020), "Optimizing
millions of hyperparameters by implicit differentiation"; Polyak (1964), "Some methods of speeding up the convergence of
iteration methods" (momentum).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, SolverFailed
from retrograd.linalg.orthonormal import normalise
from retrograd.linalg.solution import Solution
from retrograd.progress import track

GROWTH_LIMIT = 1e4


def neumann(
    multiply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "query P"],
    *,
    step: float,
    iterations: int,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    start: Float[Tensor, "query P"] | None = None,
    momentum: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    tolerance: float = 0.0,
) -> Solution:
    """Solve A v = q, or with few iterations nearly (A + ρI) v = q with ρ = 1 / (step · iterations).

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        right: the right-hand sides q.
        step: α, below 2 / the largest eigenvalue of P⁻¹A.
        iterations: how many at most, J.
        preconditioner: multiplies every row by P⁻¹.
        start: where to begin; 0 if not given.
        momentum: β of the heavy ball, 0 ≤ β < 1.
        schedule: factor on the step at iteration 0, 1, …
        tolerance: a row stops when its residual is at most this share of its right-hand side; 0: none stops early.

    Raises:
        InputError: an option is out of its range.
        NonFinite: a right-hand side is not finite.
        SolverFailed: the iteration diverges.

    >>> solution = neumann(lambda rows: 0.5 * rows, torch.tensor([[1.0]]), step=1.0, iterations=3)
    >>> solution.values.item(), solution.residuals.item()  # 1 + 1/2 + 1/4, on the way to 1/0.5
    (1.75, 0.125)
    """
    return lissa(
        lambda vectors, _: multiply(vectors),
        right,
        step=step,
        iterations=iterations,
        preconditioner=preconditioner,
        start=start,
        momentum=momentum,
        schedule=schedule,
        tolerance=tolerance,
    )


def lissa(
    multiply: Callable[[Tensor, int], Tensor],
    right: Float[Tensor, "query P"],
    *,
    step: float,
    iterations: int,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    start: Float[Tensor, "query P"] | None = None,
    momentum: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    tolerance: float = 0.0,
) -> Solution:
    """Do as `neumann`, with an operator that is another one at each iteration.

    Args:
        multiply: ``multiply(vectors, j)`` multiplies every row by A_j, and by the same whenever j is the same. The residual
            of the solution is measured with j = the iterations made, so the last may be a larger batch than the others.
        right: the right-hand sides q.
        step: α, below 2 / the largest eigenvalue of any P⁻¹A_j.
        iterations: how many at most, J.
        preconditioner: multiplies every row by P⁻¹.
        start: where to begin; 0 if not given.
        momentum: β of the heavy ball, 0 ≤ β < 1.
        schedule: factor on the step at iteration 0, 1, …
        tolerance: as in `neumann`, of residuals that here are as noisy as the products.

    Raises:
        InputError: an option is out of its range.
        NonFinite: a right-hand side is not finite.
        SolverFailed: the iteration diverges.

    >>> def noisy(vectors: Tensor, iteration: int) -> Tensor:
    ...     return vectors * (1.9 if iteration % 2 else 0.1)  # 1 on average
    >>> lissa(noisy, torch.ones(1, 1), step=1.0, iterations=500, schedule=lambda j: 1 / (2 + j)).values.round(decimals=1)
    tensor([[1.]])
    """
    if not (step > 0 and iterations >= 1 and 0 <= momentum < 1 and tolerance >= 0):
        raise InputError(
            "step and iterations must be positive, momentum at least 0 and below 1, and tolerance not negative; "
            f"got {step}, {iterations}, {momentum} and {tolerance}."
        )
    unit, norms = normalise(right)
    # The solution for a right-hand side of 0 is 0, whatever the start.
    values = torch.zeros_like(unit) if start is None else torch.where(norms[:, None] > 0, start / norms[:, None], 0.0)
    residual = unit if start is None else unit - multiply(values, 0)
    sizes = torch.linalg.vector_norm(residual, dim=1)
    limits, move, made = GROWTH_LIMIT * sizes.clamp(min=1.0), torch.zeros_like(unit), 0
    for iteration in track(range(iterations), "Neumann series"):
        active = sizes > tolerance
        if not active.any():
            break
        towards = residual if preconditioner is None else preconditioner(residual)
        length = step if schedule is None else step * schedule(iteration)
        move = torch.where(active[:, None], momentum * move + length * towards, 0.0)
        values, made = values + move, iteration + 1
        residual = unit - multiply(values, made)
        sizes = torch.linalg.vector_norm(residual, dim=1)
        _check_growth(sizes, limits, f"{made} of {iterations}", step)
    return Solution(values * norms[:, None], sizes, made, sizes <= tolerance)


def _check_growth(sizes: Float[Tensor, " query"], limits: Float[Tensor, " query"], made: str, step: float) -> None:
    wrong = ~(sizes <= limits)  # not `sizes > limits`, which NaN is not either
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise SolverFailed(
            f"the iteration diverges: after {made} iterations the residual of query {row} is {sizes[row].item():.3g} times its "
            f"right-hand side. Take a step smaller than {step:g}, below 2 / the largest eigenvalue of the (preconditioned) "
            "operator; if the operator may have negative eigenvalues, add damping larger than they are."
        )
