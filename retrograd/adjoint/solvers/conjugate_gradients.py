"""Conjugate gradients on the damped system: the exact solution, from products with all examples.

    A x = q,  A = w G + δ + λ        ‖q − A x‖ ≤ tolerance · ‖q‖

Iterations and preconditioner: see `retrograd.linalg.conjugate_gradients`. A preconditioner is another curvature P, applied as
(w P + δ + λ)⁻¹ with the same damping; `EKFAC` and `Nystrom` are good ones.

Assumptions: A is positive definite, so damping has to outweigh what negative eigenvalues a Hessian has; negative curvature that
is met on the way is an error. Without convergence there is no answer either, since where the iteration stops short depends
on the query. Cost: one product with all examples an iteration; about √(σ_max/λ) iterations for each digit, less with a
preconditioner. Memory: about five vectors a query.

References: Martens (2010), "Deep learning via Hessian-free optimization"; Koh, Liang (2017), "Understanding black-box
predictions via influence functions", section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from retrograd.adjoint.solvers.solver import System
from retrograd.curvature import Curvature
from retrograd.errors import SolverFailed
from retrograd.linalg import conjugate_gradients
from retrograd.params import Params


@dataclass(frozen=True)
class ConjugateGradients:
    """Solves with products of all examples.

    Args:
        tolerance: the residual at which a query is solved, as a share of its gradient.
        iterations: how many at most.
        preconditioner: another curvature, or None.
    """

    tolerance: float = 1e-4
    iterations: int = 500
    preconditioner: Curvature | None = None

    citation: ClassVar[str] = """@inproceedings{martens2010deep,
  title = {Deep Learning via {Hessian}-free Optimization},
  author = {Martens, James},
  booktitle = {International Conference on Machine Learning}, year = {2010}
}"""

    def solve(self, system: System, right: Params, /) -> Params:
        """Return (w G + δ + λ)⁻¹ of all right-hand sides.

        Raises:
            InputError: the curvature has no products, or an option is out of its range.
            SolverFailed: ``iterations`` are too few, or the damped curvature is not positive definite.
        """
        matrix, towards = system.damped(), None
        if self.preconditioner is not None:
            towards = matrix.inverse_of(system.operator(self.preconditioner), matrix.shift)
        # The recurrence that ends the iteration drifts from the residual that is measured in the end: half leaves it room.
        solution = conjugate_gradients(
            matrix, matrix.flat(right), preconditioner=towards, tolerance=self.tolerance / 2, iterations=self.iterations
        )
        system.note(matrix.shift, solution)
        unsolved = solution.residuals > self.tolerance
        if unsolved.any():
            raise SolverFailed(
                f"conjugate gradients left {int(unsolved.sum())} of {len(unsolved)} queries unsolved "
                f"after {solution.iterations} iterations: residuals up to {solution.residuals.max().item():.1e}, tolerance "
                f"{self.tolerance:g}. Allow more iterations, give a preconditioner (EKFAC()), more damping, a larger "
                "tolerance, or float64."
            )
        return matrix.named(solution.values)
