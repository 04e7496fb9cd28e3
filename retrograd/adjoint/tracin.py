"""TracIn: every step's effect is taken to stay as it was made (Pruthi et al. 2020).

With A_t := I, and ∇f taken anew at each of C checkpoints θ_c, example i's score is

    d f / d w_i ≈ − Σ_c  Σ_{t ∈ window c, i ∈ batch t}  ⟨s_t ∘ ∇f(θ_c), ∇ℓ_i(θ_c)⟩ / B_t

θ_c        the parameters at checkpoint c; its window is the stretch of the run that is nearest to it;
s_t        the step size −dθ/dg of the update rule, momentum summed up: η/(1−μ) for SGD, η/(√v̂ + ε) a coordinate for Adam;
B_t        the number of examples in batch t.

This is the published TracInCP with its learning rates, number of visits and batch size filled in, so that scores have the
same sign and unit as the exact ones (TracIn itself has the opposite sign: its proponents lower the loss). One checkpoint at
the end gives gradient dot products; ``cosine=True`` divides by both gradients' norms and loses the unit.

Assumptions: nothing that one step does is amplified or undone by later ones. Good early in training, poor near
convergence, where curvature undoes most of each step. Losses are evaluated in evaluation mode. Cost: C passes over the
training data for each query, and no replay beyond the C states.

References: Pruthi, Liu, Sundararajan, Kale (2020), "Estimating training data influence by tracing gradient descent",
section 3.2; Charpiat et al. (2019), "Input similarity from the neural network perspective" (cosine).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.adjoint.adjoint import Notes, ScorePart
from retrograd.adjoint.contraction import example_gradients
from retrograd.adjoint.queries import Queries
from retrograd.errors import InputError
from retrograd.params import Params, flatten
from retrograd.progress import track
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class TracIn:
    """TracIn over checkpoints of the run.

    Args:
        checkpoints: a number of checkpoints in the middles of equal stretches of the run, or the steps themselves.
        cosine: divide each product by the norms of both gradients (scores then have no unit).
        batch_size: training examples whose gradients are taken together; the result does not depend on it.
    """

    checkpoints: int | Sequence[int] = 6
    cosine: bool = False
    batch_size: int = 256

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{pruthi2020tracin,
  title = {Estimating Training Data Influence by Tracing Gradient Descent},
  author = {Pruthi, Garima and Liu, Frederick and Sundararajan, Mukund and Kale, Satyen},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2020}
}"""

    def parts(self, run: Run, queries: Queries, notes: Notes, /) -> Iterator[ScorePart]:
        """Yield the scores of a batch of training examples at a checkpoint."""
        steps = self.steps(run)
        notes.add(checkpoints=", ".join(map(str, steps)), exact=False)
        exposure = torch.ones(len(steps), len(run.examples)) if self.cosine else run.exposure(steps)
        batches = run.examples.ids.split(self.batch_size)
        work = [(index, ids) for index in range(len(steps)) for ids in batches]
        state: TrainingState | None = None
        vectors: Params = {}
        for index, ids in track(work, "checkpoints × training data"):
            if state is None or state.step != steps[index]:
                state = run.state(steps[index])
                vectors = self._preconditioned(run, state, queries.gradients(run, state).params)
            products = self._products(run, state, ids, vectors)
            yield ScorePart(ids, -products * exposure[index][run.examples.rows(ids)].to(products))

    def steps(self, run: Run) -> list[int]:
        """Return the checkpoints' steps in ``run``."""
        if isinstance(self.checkpoints, int):
            if not 1 <= self.checkpoints <= max(len(run), 1):
                raise InputError(f"checkpoints must be between 1 and the number of steps, {len(run)}, got {self.checkpoints}.")
            return run.spread(self.checkpoints)
        return sorted(self.checkpoints)

    def _preconditioned(self, run: Run, state: TrainingState, gradients: Params) -> Params:
        """Multiply the queries' gradients by the step size per unit of learning rate."""
        if self.cosine:
            norms = flatten(gradients.values(), batched=True).norm(dim=1)
            return {name: leaf / norms.view(-1, *[1] * (leaf.dim() - 1)) for name, leaf in gradients.items()}
        return {name: leaf * run.step_size(state, name) for name, leaf in gradients.items()}

    def _products(self, run: Run, state: TrainingState, ids: Tensor, vectors: Params) -> Tensor:
        """⟨v_q, ∇ℓ_i⟩ for all queries and the examples of one batch, ``[query, example]``."""
        gradients = example_gradients(run.update_map, run.examples, state, ids)
        matrix = flatten(gradients.values(), batched=True)
        if self.cosine:
            matrix = matrix / matrix.norm(dim=1, keepdim=True)
        return flatten((vectors[name] for name in gradients), batched=True) @ matrix.T
