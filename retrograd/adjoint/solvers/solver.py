"""What is solved for an influence function, and what solves it.

    (w G + δ + λ) x_q = ∇f_q

G          curvature of the mean loss at the end of the run;
w, δ       mean recorded weight of the examples, and the optimizer's weight decay;
λ          damping. It has one meaning everywhere: ``damping`` × w × the mean eigenvalue of a block of G (of all of G for
           curvatures that are one block), or 1 / Σ_t η_t for ``damping="training_time"``.

An optimizer with a preconditioner P has trained each coordinate for a time of its own, P Σ_t η_t. Its training-time damping is
P⁻¹ / Σ_t η_t; in units of P^½ that is a number again, and so the system is solved in those: P^½ (w P^½ G P^½ + δ + λ)⁻¹ P^½ ∇f.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.preconditioner import mean_square, preconditioner
from retrograd.adjoint.solvers.damped import Damped
from retrograd.curvature import Curvature, Operator
from retrograd.curvature.products import with_products
from retrograd.linalg import Solution
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class System:
    """The damped system at one state of a run.

    Attributes:
        run: gives model, task, examples, weights and decay.
        state: where.
        curvature: the form of G.
        damping: see above.
        seed: of whatever is drawn.
        engine: keeps fitted operators, memory bound and notes.
    """

    run: Run
    state: TrainingState
    curvature: Curvature
    damping: float | Literal["training_time"]
    seed: int
    engine: Engine

    def operator(self, curvature: Curvature | None = None) -> Operator:
        """Return G, or another curvature, fitted once for all slices of queries."""
        curvature = self.curvature if curvature is None else curvature
        key = ("implicit", repr(curvature), self.damping, self.state.step, self.seed)
        return self.engine.once(key, lambda: curvature.fit(self.run, [self.state], seed=self.seed, scale=self.scale))

    @property
    def scale(self) -> Params | None:
        """P^½ where the system is solved in its units."""
        return self._preconditioner[1]

    def damped(self) -> Damped:
        """Return the matrix w G + δ + λ, for solvers that need only its products.

        Raises:
            InputError: the curvature has no products.
        """
        operator = with_products(self.curvature, self.operator())
        # A training time needs no mean eigenvalue, which costs products.
        mean = 0.0 if self.damping == "training_time" else operator.mean
        return Damped(operator, self.run.mean_weight, self.shift(mean))

    def note(self, shift: float, solution: Solution) -> None:
        """Note what was added to the eigenvalues and how far the solver came, over all slices of queries."""
        before, residual = self.engine.notes.entries, solution.residuals.max().item() if len(solution.residuals) else 0.0
        self.engine.notes.add(
            added_to_eigenvalues=shift,
            solver_iterations=max(solution.iterations, before.get("solver_iterations", 0)),
            largest_residual=max(residual, before.get("largest_residual", 0.0)),
        )

    def shift(self, mean: float) -> float:
        """Return δ + λ for a block of G with this mean eigenvalue."""
        if self.damping == "training_time":
            size, scale = self._preconditioner
            time = self.run.exposure([len(self.run)]).sum().item() * size
            return self.run.weight_decay * mean_square(scale) + self.run.shrinkage + 1 / time
        return self.run.weight_decay + self.damping * self.run.mean_weight * mean

    @cached_property
    def _preconditioner(self) -> tuple[float, Params | None]:
        return preconditioner(self.run, [self.state]) if self.damping == "training_time" else (1.0, None)


@runtime_checkable
class Solver(Protocol):
    """A way to solve the system, made of hyperparameters alone."""

    def solve(self, system: System, right: Params, /) -> Params:
        """Return x for every right-hand side, a leading axis ``query`` on every leaf; both in units of ``system.scale``."""
        ...
