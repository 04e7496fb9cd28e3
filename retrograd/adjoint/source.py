"""SOURCE: training in a few segments, each of which is an influence function with a damping of its own (Bae et al. 2024).

The run is cut into L segments of K_l steps. Within a segment Hessian and gradients are taken to be stationary; then its exact
product of steps and the sum of what its steps put in are functions of the averaged curvature H_l alone, with c_l = Σ η over the
segment (momentum summed up: times 1/(1 − μ)):

    S_l = exp(−c_l H_l)                              what becomes of the state over the segment
    r_l(i) = (1 − exp(−c_l H_l)) H_l⁻¹ ḡ_l(i) / N    what example i puts in

    d f / d w_i ≈ − ∇f(θ_T)ᵀ Σ_l S_L S_{L−1} … S_{l+1} r_l(i)                                          equations 13 to 15

H_l        Gauss-Newton matrix, averaged over the segment's checkpoints, in the form that ``curvature`` gives it, plus coupled
           weight decay;
ḡ_l(i)     ∇ℓ_i, averaged over the segment's checkpoints; N examples were trained on.

From the query's side it is a walk back: p_l = F(H_l) q, scores −⟨p_l, ḡ_l(i)⟩ / N, then q ← S_l q. F(σ) = (1 − e^{−cσ})/σ is
c where there is no curvature and 1/σ where there is much: as 1/(σ + 1/c), an influence function whose damping says how long the
segment trained.

Assumptions: order and seed average out (it answers for the expected run), each example is visited as often as any other, and
the optimizer is SGD with or without momentum. Exact unrolling knows this run's seed, SOURCE does not: their errors are nearly
independent (see `Blend`). Cost: for each of C checkpoints a share of a curvature fit and a pass over the data for all queries.
Memory: factors of one segment and [query, P].

Reference: Bae, Lin, Lorraine, Grosse (2024), "Training data attribution via approximate unrolled differentiation"; momentum:
appendix D.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.adjoint.adjoint import Notes, ScorePart
from retrograd.adjoint.contraction import contract
from retrograd.adjoint.queries import Queries
from retrograd.curvature import EKFAC, Curvature
from retrograd.errors import InputError, UnsupportedTraining
from retrograd.progress import track_steps
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class Source:
    """SOURCE over segments of the run.

    Args:
        segments: L, how many segments of equal length.
        checkpoints_per_segment: states of each segment that curvature and gradients are averaged over.
        curvature: how the Gauss-Newton matrix is approximated.
        batch_size: training examples whose gradients are taken together; the result does not depend on it.
        seed: of the labels that are sampled for the curvature.
    """

    segments: int = 3
    checkpoints_per_segment: int = 2
    curvature: Curvature = field(default_factory=EKFAC)
    batch_size: int = 256
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{bae2024training,
  title = {Training Data Attribution via Approximate Unrolled Differentiation},
  author = {Bae, Juhan and Lin, Wu and Lorraine, Jonathan and Grosse, Roger},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}"""

    def __post_init__(self):
        if self.segments < 1 or self.checkpoints_per_segment < 1:
            raise InputError(
                f"segments and checkpoints_per_segment must be at least 1, got {self.segments} and "
                f"{self.checkpoints_per_segment}."
            )

    def parts(self, run: Run, queries: Queries, notes: Notes, /) -> Iterator[ScorePart]:
        """Yield the scores of one batch of training examples after the other, the last segment first."""
        count = self.segments * self.checkpoints_per_segment
        steps = run.spread(count) if len(run) >= count else []
        if len(set(steps)) < count:
            raise InputError(f"this run of {len(run)} steps has no {count} checkpoints; ask for fewer segments or checkpoints.")
        notes.add(checkpoints=", ".join(map(str, steps)), exact=False)
        exposure = run.exposure(steps)
        trained_on = run.examples.ids[exposure.sum(0) > 0]
        batches = trained_on.split(self.batch_size)
        work = self._work(run, queries, steps, exposure.sum(1), batches, len(trained_on))
        yield from track_steps(work, count * len(batches), "checkpoints × training data")

    def _work(
        self, run: Run, queries: Queries, steps: list[int], rates: Tensor, batches: Sequence[Tensor], examples: int
    ) -> Iterator[ScorePart]:
        weight, decay = run.mean_weight, run.weight_decay
        vectors = queries.gradients(run, run.final_state).params
        for segment in reversed(range(self.segments)):
            own = slice(segment * self.checkpoints_per_segment, (segment + 1) * self.checkpoints_per_segment)
            states = [run.state(step) for step in steps[own]]
            duration = rates[own].sum().item() * _momentum(run, states[-1])
            operator = self.curvature.fit(run, states, seed=self.seed)

            def put_in(eigenvalues: Tensor, duration: float = duration) -> Tensor:
                curved = duration * (weight * eigenvalues + decay)
                return duration * torch.where(curved > 0, -torch.expm1(-curved) / curved.clamp(min=_TINY), 1.0)

            def kept(eigenvalues: Tensor, duration: float = duration) -> Tensor:
                return torch.exp(-duration * (weight * eigenvalues + decay))

            pulled = operator.apply(put_in, vectors)
            for state in states:
                scale = -1 / (examples * len(states))
                yield from contract(run.update_map, run.examples, state, pulled, batches, scale)
            vectors = operator.apply(kept, vectors)


_TINY = torch.finfo(torch.float64).tiny


def _momentum(run: Run, state: TrainingState) -> float:
    """What one unit of gradient moves in the long run per unit of learning rate; the same number for all parameters."""
    sizes = [run.step_size(state, name) for name in run.update_map.names]
    if any(isinstance(size, Tensor) and size.numel() > 1 for size in sizes) or len({float(size) for size in sizes}) > 1:
        raise UnsupportedTraining(
            "SOURCE takes one step size for all parameters, which this optimizer has not. Use Unrolled(), which is exact for "
            "every optimizer, or TracIn()."
        )
    return float(sizes[0])
