"""Solve A v = q by conjugate gradients, several right-hand sides at once.

    v ← v + α p,   r ← r − α A p,   α = r·P⁻¹r / p·A p
    p ← P⁻¹r + β p                  β = (r·P⁻¹r)_new / (r·P⁻¹r)_old                  (Saad 2003, algorithm 9.1)

q, v       right-hand side and solution, rows of [query, P], each with α, β and an end of its own;
r, p       residual q − A v, and the direction of search;
P          the preconditioner, an approximation of A that is easy to invert.

Assumptions: A and P are symmetric and positive definite; A may be singular if q is in its range. Each product is with the
same A: a mini-batch drawn anew for each product breaks it (take `lissa`). Negative curvature, p·A p ≤ 0, raises an error,
because what was found until then solves nothing.
Cost: one product an iteration, and one in the end for the true residual, since the recurrence for r drifts from it. The error
falls by (√κ − 1)/(√κ + 1) an iteration, κ the condition number of P⁻¹A. Memory: about five vectors a right-hand side.

References: Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving linear systems"; Saad (2003), "Iterative
methods for sparse linear systems", section 9.2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrograd.errors import InputError, SolverFailed
from retrograd.linalg.orthonormal import normalise
from retrograd.linalg.solution import Solution
from retrograd.progress import track


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "query P"],
    *,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-6,
    iterations: int = 100,
) -> Solution:
    """Solve A v = q for a symmetric positive definite A.

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        right: the right-hand sides q.
        preconditioner: multiplies every row by P⁻¹.
        tolerance: a row stops when its residual is at most this share of its right-hand side.
        iterations: how many at most; ``converged`` of the solution says which rows needed more.

    Raises:
        InputError: tolerance or iterations are not positive.
        NonFinite: a right-hand side is not finite.
        SolverFailed: A or the preconditioner is not positive definite.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> solution = conjugate_gradients(lambda rows: rows @ matrix, torch.tensor([[6.0, 7.0]], dtype=torch.float64))
    >>> [round(value, 9) for value in solution.values[0].tolist()], solution.iterations, solution.converged.tolist()
    ([1.0, 2.0], 2, [True])
    """
    if not (tolerance > 0 and iterations >= 1):
        raise InputError(f"tolerance and iterations must be positive, got {tolerance} and {iterations}.")
    # Solved for right-hand sides of length one: gradients can be so small that squares of their residuals underflow.
    unit, norms = normalise(right)
    values, residual = torch.zeros_like(unit), unit
    direction = unit if preconditioner is None else preconditioner(unit)
    product = _dot(residual, direction)
    # Below rounding the recurrence goes on shrinking, but means nothing.
    enough = max(tolerance, torch.finfo(right.dtype).eps)
    active, made = torch.linalg.vector_norm(unit, dim=1) > enough, 0
    for _ in track(range(iterations), "conjugate gradients"):
        if not active.any():
            break
        _check_positive(product, active, "preconditioner", made)
        image = multiply(direction)
        curvature = _dot(direction, image)
        _check_positive(curvature, active, "operator", made)
        length = _ratio(product, curvature, active)
        values, residual = values + length * direction, residual - length * image
        towards = residual if preconditioner is None else preconditioner(residual)
        before, product = product, _dot(residual, towards)
        active, made = active & (torch.linalg.vector_norm(residual, dim=1) > enough), made + 1
        direction = torch.where(active[:, None], towards + _ratio(product, before, active) * direction, 0.0)
    residuals = torch.linalg.vector_norm(unit - multiply(values), dim=1)
    return Solution(values * norms[:, None], residuals, made, residuals <= tolerance)


def _dot(left: Float[Tensor, "query P"], right: Float[Tensor, "query P"]) -> Float[Tensor, " query"]:
    return (left * right).sum(dim=1)


def _ratio(
    above: Float[Tensor, " query"], below: Float[Tensor, " query"], active: Bool[Tensor, " query"]
) -> Float[Tensor, "query 1"]:
    """Divide; rows that are done get 0, never 0/0."""
    return torch.where(active, above / torch.where(active, below, 1.0), 0.0)[:, None]


def _check_positive(values: Float[Tensor, " query"], active: Bool[Tensor, " query"], what: str, made: int) -> None:
    wrong = active & ~((values > 0) & values.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise SolverFailed(
            f"conjugate gradients need a positive definite {what} M, but x·Mx is {values[row].item():.3g} for query {row} "
            f"after {made} iterations. Add damping larger than its most negative eigenvalue, or take the Gauss-Newton matrix "
            "in place of the Hessian. If M is positive definite, see that all products are with the same M."
        )
