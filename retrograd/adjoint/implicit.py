"""Influence functions: the run is taken to have converged, and the infinite product of steps is summed up (Koh and Liang 2017).

At a minimum of the mean loss L(θ, w) = Σ_i w_i ℓ_i(θ) / N, the implicit function theorem gives dθ/dw_i = −H⁻¹ ∇ℓ_i / N, so

    d f / d w_i ≈ − ⟨(G + λ)⁻¹ ∇f(θ_T), ∇ℓ_i(θ_T)⟩ / N

G          Gauss-Newton matrix of the mean loss over the N training examples, in the form that ``curvature`` gives it, times
           their mean recorded weight;
λ          damping: ``damping`` × the mean eigenvalue of each block of G, plus the optimizer's weight decay; or, with
           ``damping="training_time"``, 1 / Σ_t η_t (momentum summed up; Adam's for each coordinate), which is what ended the
           run before it converged.

The inverse is applied by the curvature's own functions (K-FAC, EK-FAC, Fisher, Nyström, …) or by a ``solver`` that needs only
products (conjugate gradients, Neumann/LiSSA, EK-FAC-preconditioned Neumann, DataInf): see `retrograd.adjoint.solvers`.

Assumptions: training has converged to where the gradient vanishes, G stands for the Hessian, and order and length of training
play no part. So it answers for the expected run, not for this one's seed; undertrained models are better served by `Source`,
which is this with a damping for each stretch of training (1 over the learning rates summed up). Cost: fitting G (a few passes
over the data) or solving, and one pass for all queries. Memory: G's factors and [query, P].

References: Koh, Liang (2017), "Understanding black-box predictions via influence functions", equation 2; Grosse et al. (2023),
"Studying large language model generalization with influence functions" (EK-FAC, and damping 0.1 × the mean eigenvalue); Bae et
al. (2024), "Training data attribution via approximate unrolled differentiation" (damping from the training time).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import Probe, ScorePart
from retrograd.adjoint.preconditioner import times
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.solvers import Solver, Spectral, System
from retrograd.curvature import EKFAC, Curvature
from retrograd.errors import InputError
from retrograd.trajectory import Run


@dataclass(frozen=True)
class Implicit:
    """Influence functions at the end of the run.

    Args:
        curvature: how the Gauss-Newton matrix is approximated.
        solver: how the damped system is solved.
        damping: times the mean eigenvalue of a block is added to all its eigenvalues; or ``"training_time"``.
        seed: of whatever is drawn, as the labels for the curvature.
    """

    curvature: Curvature = field(default_factory=EKFAC)
    solver: Solver = field(default_factory=Spectral)
    damping: float | Literal["training_time"] = 0.1
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{koh2017understanding,
  title = {Understanding Black-box Predictions via Influence Functions},
  author = {Koh, Pang Wei and Liang, Percy},
  booktitle = {International Conference on Machine Learning}, year = {2017}
}
@article{grosse2023studying,
  title = {Studying Large Language Model Generalization with Influence Functions},
  author = {Grosse, Roger and others}, journal = {arXiv preprint arXiv:2308.03296}, year = {2023}
}"""

    def __post_init__(self):
        if isinstance(self.damping, str) and self.damping != "training_time":
            raise InputError(f"damping is a number or 'training_time', got {self.damping!r}.")
        if not isinstance(self.damping, str) and not self.damping > 0:
            raise InputError(
                f"damping must be above 0, or directions without curvature would count without bound; got {self.damping}."
            )

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of one batch of training examples after the other."""
        engine.notes.add(exact=False, damping=self.damping)
        yield from engine.contract(run, self._probes(run, queries, engine), 1)

    def _probes(self, run: Run, queries: Queries, engine: Engine) -> Iterator[Probe]:
        state = run.final_state
        system = System(run, state, self.curvature, self.damping, self.seed, engine)
        inside = self.solver.solve(system, times(queries.gradients(run, state).params, system.scale))
        trained_on = (run.exposure([len(run)])[0] > 0).double()
        yield Probe((state,), times(inside, system.scale), trained_on / trained_on.sum())
