"""TRAK: randomly projected gradients of the margin as the features of a logistic regression (Park et al. 2023).

The trained model is replaced by its linearisation in the parameters, these by d random projections of them, and the effect of
an example is that of a Newton step of the logistic regression that is left:

    score[q, i] = φ_qᵀ K⁻¹ φ_i · Q_i / N,        K = w Φᵀ Φ / N + λ,        Q_i = −⟨∇ℓ_i, ∇f_i⟩ / ‖∇f_i‖²

φ_i, φ_q   G ∇f(θ_T), the projected gradient of the measurement of training example i and of query q; Φ has rows φ_i;
Q_i        by how much ∇ℓ_i = −Q_i ∇f_i. For cross-entropy and the margin f = log p/(1 − p) that is 1 − p_i; for a
           log-probability it is 1. The formula needs only that both gradients are parallel, which is checked for every example;
w          mean recorded weight of the examples; 1 but for runs that were matched;
λ          ``damping`` × w × the mean eigenvalue of Φᵀ Φ / N. The paper has none; 0 is an error here where Φᵀ Φ is singular.

As Q_i φ_i = −G ∇ℓ_i, this is an influence function with `ProjectedGaussNewton` of measurements for its curvature: positive
means that more weight on i raises the measurement.

Several models: the paper averages φ_qᵀ K⁻¹ φ_i and Q_i over models and multiplies the means. ``others`` are such further runs
(of other seeds, or of random halves of the data), each with a projection of its own. attribute([run, …], method=TRAK())
averages the products instead, as for every method; the two differ by the covariance over models of both factors.

Assumptions: runs differ as little as a linear model can say; the weights p(1 − p) of logistic regression are left out of K, as
published. Every example of the data is scored, whether a model saw it or not (random halves). Weight decay is not added to K.
No scores by token (`Implicit` with `ProjectedGaussNewton` of measurements has them). Cost: two gradients an example and model,
once for all queries, and N · d · P multiplications. Memory: d², and N · d numbers as far as ``memory`` goes; beyond it the
gradients are made twice.

Reference: Park, Georgiev, Ilyas, Leclerc, Mądry (2023), "TRAK: attributing model behavior at scale".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.gradient_store import GradientStore
from retrograd.adjoint.parts import ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.curvature.projected import ProjectedOperator, measurement_gradients
from retrograd.curvature.pseudo_gradients import device_of
from retrograd.errors import InputError, SolverFailed
from retrograd.linalg import Projection
from retrograd.params import count, flatten
from retrograd.trajectory import Run, TrainingState
from retrograd.trajectory.per_example import loss_gradients
from retrograd.trajectory.trajectory import to_device


@dataclass(frozen=True, repr=False)
class TRAK:
    """TRAK at the end of one run or several.

    Args:
        dimension: d, how many numbers stand for a gradient; no projection is made from the number of parameters on. Well below
            the number of examples: with d near it Φᵀ Φ is nearly singular.
        damping: times the mean eigenvalue is added to all of them; 0 as published.
        others: further runs on the same examples, to take the means over.
        seed: of the projection; that of the n-th further run is n more.
    """

    dimension: int = 512
    damping: float = 0.1
    others: Sequence[Run] = ()
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{park2023trak,
  title = {{TRAK}: Attributing Model Behavior at Scale},
  author = {Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and M{\\k{a}}dry, Aleksander},
  booktitle = {International Conference on Machine Learning}, year = {2023}
}"""

    def __post_init__(self):
        if self.dimension < 1 or self.damping < 0:
            raise InputError(f"dimension is at least 1 and damping at least 0, got {self.dimension} and {self.damping}.")

    def __repr__(self) -> str:
        """Say all that decides the scores, runs by their digests."""
        others = "".join(f", {run.digest[:12]}" for run in self.others)
        return f"TRAK(dimension={self.dimension}, damping={self.damping}, others=({others[2:]}), seed={self.seed})"

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of one part of the training examples after the other."""
        if engine.rank is not None:
            raise InputError("TRAK carries projected queries, of its own dimension; leave out rank.")
        run.update_map.gradient.refuse_game()
        engine.notes.add(exact=False, damping=self.damping, projection=self.dimension, models=1 + len(self.others))
        models = engine.once(("trak", repr(self)), lambda: self._models(run, engine))
        costates = [self._costates(model, queries) for model in models]
        for parts in zip(*(model.rows for model in models), strict=True):
            products, shares = [], []
            for costate, (_, rows) in zip(costates, parts, strict=True):
                rows = rows.to(costate.device)
                products.append(costate.to(rows) @ rows[:, :-1].T)
                shares.append(rows[:, -1])
            values = torch.stack(products).mean(0) * torch.stack(shares).mean(0) / len(run.examples)
            yield ScorePart(parts[0][0], values)

    def _models(self, run: Run, engine: Engine) -> "list[_Model]":
        runs = [run, *(other.matching(run.counterfactual) for other in self.others)]
        for other in runs[1:]:
            if other.examples.root() != run.examples.root():
                raise InputError("the further runs of TRAK must be of the same examples in the same order as the first.")
        return [_Model(one, self.dimension, self.seed + number, engine.memory // len(runs)) for number, one in enumerate(runs)]

    def _costates(self, model: "_Model", queries: Queries) -> Tensor:
        gradients = queries.gradients(model.run, model.state).params
        weight = model.run.mean_weight

        def inverse(eigenvalues: Tensor, mean: float) -> Tensor:
            damped = eigenvalues + self.damping * mean
            # Φ is known to the eps of its dtype, so its squares are to eps²; but their sums are made in float64.
            rounding = max(torch.finfo(model.dtype).eps ** 2, torch.finfo(damped.dtype).eps)
            least = len(damped) * rounding * damped.max()
            if not (damped > least).all():
                raise SolverFailed(
                    f"Φᵀ Φ of {len(model.run.examples)} examples has {int((damped <= least).sum())} of {len(damped)} "
                    f"eigenvalues at 0, so it has no inverse. Give more damping (now {self.damping}), or a smaller dimension."
                )
            return 1 / (weight * damped)

        return model.operator.inside(inverse, model.projected(gradients))


class _Model:
    """One run's Φ and Q, side by side ``[example, d + 1]``, and K."""

    def __init__(self, run: Run, dimension: int, seed: int, memory: int):
        self.run, self.state = run, run.final_state
        params = self.state.params
        self.dtype = next(iter(params.values())).dtype
        self.projection = Projection(count(params), dimension, seed, memory=memory // 8)
        at_once = max(1, memory // 4 // (4 * count(params) * self.dtype.itemsize))  # two gradients, each with a flat copy
        width = self.projection.dimension + 1
        self.rows = GradientStore(run.examples.ids, width, self.dtype, self._make, at_once=min(at_once, 256), room=memory // 8)
        total = torch.zeros(width - 1, width - 1, dtype=torch.float64, device=device_of(self.state))
        for _, rows in self.rows:
            own = rows[:, :-1].to(total)
            total += own.T @ own
        self.operator = ProjectedOperator.of(total / len(run.examples), self.projection, params)

    def projected(self, gradients: dict[str, Tensor]) -> Tensor:
        """Project gradients, ``[n, d]``."""
        return self.projection.down(flatten((gradients[name] for name in self.state.params), batched=True))

    def _make(self, ids: Tensor) -> Tensor:
        state, update_map, names = self.state, self.run.update_map, tuple(self.state.params)
        batch = to_device(self.run.examples.batch(ids), device_of(state))
        measured = flatten(measurement_gradients(update_map, state, batch, len(ids), names).values(), batched=True)
        losses = flatten(loss_gradients(update_map, state, batch, len(ids), names).values(), batched=True)
        shares = parallel(measured, losses, ids, state)
        return torch.cat([self.projection.down(measured), shares[:, None]], dim=1)


def parallel(measured: Tensor, losses: Tensor, ids: Tensor, state: TrainingState) -> Tensor:
    """Return Q_i of ∇ℓ_i = −Q_i ∇f_i from rows ∇f_i and ∇ℓ_i.

    Raises:
        InputError: some ∇ℓ_i is not parallel to ∇f_i.
    """
    squares = measured.square().sum(1)
    shares = -(measured * losses).sum(1) / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    eps = torch.finfo(squares.dtype).eps
    # p − 1 loses its digits where p is near 1, and with it ∇ℓ, but not by more than rounding of ∇f.
    allowed = eps**0.5 * losses.norm(dim=1) + 100 * eps * squares.sqrt()
    wrong = (losses + shares[:, None] * measured).norm(dim=1) > allowed
    if wrong.any():
        raise InputError(
            f"TRAK needs a measurement of which the loss is a function, as the margin log p/(1 − p) is for cross-entropy: the "
            f"gradients of loss and measurement of example {int(ids[wrong.nonzero()[0, 0]])} at step {state.step} are not "
            "parallel. Give the task such a measurement (Classification() without label smoothing has one), or use Implicit."
        )
    return shares
