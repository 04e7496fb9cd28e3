"""The Neumann series on the damped system, with all examples or with mini-batches of them (LiSSA).

    x ← x + α (q − A_B x),  x₀ = 0        A_B = w G_B + δ + λ

B          a mini-batch drawn anew at each iteration, or all examples;
α          ``step``: 1 over the largest eigenvalue of A, estimated, if not given.

**Stopping early is damping**: J iterations solve nearly the system with 1/(αJ) added (see `retrograd.linalg.neumann`). With
mini-batches x fluctuates about the solution, less with a smaller step or the mean of several ``repeats``.

Assumptions: A is positive definite and α σ_max < 2, for each mini-batch; else it diverges, which is an error. Cost: a product
with a mini-batch an iteration, often thousands of them. Memory: four vectors a query.

References: Agarwal, Bullins, Hazan (2017), "Second-order stochastic optimization for machine learning in linear time"; Koh,
Liang (2017), "Understanding black-box predictions via influence functions", section 3.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from retrograd.adjoint.solvers.solver import System
from retrograd.errors import InputError
from retrograd.linalg import lissa
from retrograd.params import Params


@dataclass(frozen=True)
class Neumann:
    """Sums up the Neumann series; with a ``batch_size`` it is LiSSA.

    Args:
        iterations: J, how many.
        step: α, or None to estimate it.
        batch_size: examples of a mini-batch, or None for all.
        seed: of the mini-batches.
        repeats: how many runs with other mini-batches are averaged.
    """

    iterations: int = 1000
    step: float | None = None
    batch_size: int | None = None
    seed: int = 0
    repeats: int = 1

    citation: ClassVar[str] = """@article{agarwal2017second,
  title = {Second-Order Stochastic Optimization for Machine Learning in Linear Time},
  author = {Agarwal, Naman and Bullins, Brian and Hazan, Elad},
  journal = {Journal of Machine Learning Research}, volume = {18}, number = {116}, year = {2017}
}"""

    def __post_init__(self):
        if self.repeats < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise InputError(f"repeats and batch_size must be at least 1, got {self.repeats} and {self.batch_size}.")

    def solve(self, system: System, right: Params, /) -> Params:
        """Return nearly (w G + δ + λ)⁻¹ of all right-hand sides.

        Raises:
            InputError: the curvature has no products, or an option is out of its range.
            SolverFailed: the iteration diverges.
        """
        matrix = system.damped()
        rows, found, step = matrix.flat(right), [], self.step
        for repeat in range(self.repeats):
            batch_of = matrix.mini_batches(self.batch_size, self.iterations, self.seed + repeat)
            # Of the first mini-batches, whatever the repeat: all of them take the same step.
            step = 1 / matrix.largest(batch_of) if step is None else step
            # Its residual is measured with all examples.
            multiply = lambda vectors, number, of=batch_of: matrix(vectors, of(number))  # noqa: E731
            found.append(lissa(multiply, rows, step=step, iterations=self.iterations))
        mean = torch.stack([solution.values for solution in found]).mean(0)
        worst = torch.stack([solution.residuals for solution in found]).amax(0)
        system.note(matrix.shift, replace(found[0], residuals=worst))
        system.engine.notes.add(step=step)
        return matrix.named(mean)
