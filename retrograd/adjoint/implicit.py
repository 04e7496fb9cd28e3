"""Influence functions: the run is taken to have converged, and the infinite product of steps is summed up (Koh and Liang 2017).

At a minimum of the mean loss L(θ, w) = Σ_i w_i ℓ_i(θ) / N, the implicit function theorem gives dθ/dw_i = −H⁻¹ ∇ℓ_i / N, so

    d f / d w_i ≈ − ⟨(G + λ)⁻¹ ∇f(θ_T), ∇ℓ_i(θ_T)⟩ / N

G          Gauss-Newton matrix of the mean loss over the N training examples, in the form that ``curvature`` gives it, times
           their mean recorded weight;
λ          damping: ``damping`` × the mean eigenvalue of each block of G, plus the optimizer's weight decay.

Assumptions: training has converged to where the gradient vanishes, G stands for the Hessian, and order and length of training
play no part. So it answers for the expected run, not for this one's seed; undertrained models are better served by `Source`,
which is this with a damping for each stretch of training (1 over the learning rates summed up). Cost: fitting G (a few passes
over the data), one pass for all queries. Memory: G's factors and [query, P].

References: Koh, Liang (2017), "Understanding black-box predictions via influence functions", equation 2; Grosse et al. (2023),
"Studying large language model generalization with influence functions" (EK-FAC, and damping 0.1 × the mean eigenvalue).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from retrograd.adjoint.adjoint import Notes, ScorePart
from retrograd.adjoint.contraction import contract
from retrograd.adjoint.queries import Queries
from retrograd.curvature import EKFAC, Curvature
from retrograd.errors import InputError
from retrograd.progress import track_steps
from retrograd.trajectory import Run


@dataclass(frozen=True)
class Implicit:
    """Influence functions at the end of the run.

    Args:
        curvature: how the Gauss-Newton matrix is approximated.
        damping: times the mean eigenvalue of a block is added to all its eigenvalues.
        batch_size: training examples whose gradients are taken together; the result does not depend on it.
        seed: of the labels that are sampled for the curvature.
    """

    curvature: Curvature = field(default_factory=EKFAC)
    damping: float = 0.1
    batch_size: int = 256
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
        if not self.damping > 0:
            raise InputError(
                f"damping must be above 0, or directions without curvature would count without bound; got {self.damping}."
            )

    def parts(self, run: Run, queries: Queries, notes: Notes, /) -> Iterator[ScorePart]:
        """Yield the scores of one batch of training examples after the other."""
        notes.add(exact=False, damping=self.damping)
        state = run.final_state
        weight, decay = run.mean_weight, run.weight_decay
        operator = self.curvature.fit(run, [state], seed=self.seed)

        def inverse(eigenvalues: Tensor) -> Tensor:
            return 1 / (weight * eigenvalues + decay + self.damping * weight * eigenvalues.mean())

        vectors = operator.apply(inverse, queries.gradients(run, state).params)
        batches = run.examples.ids.split(self.batch_size)
        products = contract(run.update_map, run.examples, state, vectors, batches, -1 / len(run.examples))
        yield from track_steps(products, len(batches), "training data")
