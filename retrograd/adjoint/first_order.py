"""The last steps of training differentiated with first-order passes only, by central differences of gradients.

One step back with costates λ of its end, γ = J_gᵀ λ the cotangent that reaches the batch gradient (through the optimizer's own
Jacobian, and the clipping):

    ⟨γ, ∂g/∂u⟩ ≈ (∂_u L(θ + εγ) − ∂_u L(θ − εγ)) / 2ε,         ε = radius / ‖γ‖

for u the example weights, meta-parameters, batch, or θ itself (the Hessian product). Two passes forward and backward for each
costate and step, no second derivatives: kernels that have none will do, and memory is that of training. With ``last=1`` it is
what DARTS and SAMA take for the whole of training. As γ comes through the Jacobian of the update at the recorded slots, Adam's
preconditioner has its bias corrections; both sides draw the same random numbers, and what they do to buffers is dropped.

Assumptions: the loss is smooth on the scale of ``radius``, which has to be large enough for the arithmetic: by default the cube
root of its precision (.005 in float32). What more steps back would have added is lost: with ``last=1`` nearly all, where
training is long (`Hypergradient` reports what a pilot says).

References: Liu, Simonyan, Yang (2019), "DARTS: differentiable architecture search"; Choe et al. (2023), "Making scalable meta
learning practical" (SAMA). Common random numbers, bias correction and more than one step are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import Notes, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.unrolled import refuse_non_finite
from retrograd.errors import InputError, NotRecorded
from retrograd.trajectory import Pullback, Run, StateVectors, StepInputs, Trajectory


@dataclass(frozen=True)
class FirstOrder:
    """Truncated unrolling without second derivatives.

    Args:
        last: through how many last steps.
        radius: length of the step that is taken to both sides, in units of the parameters; by default the cube root of the
            arithmetic's precision.
    """

    last: int = 1
    radius: float | None = None

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{choe2023making,
  title = {Making Scalable Meta Learning Practical},
  author = {Choe, Sang Keun and Mehta, Sanket Vaibhav and Ahn, Hwijeen and others},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2023}
}"""

    def __post_init__(self):
        if self.last < 1 or (self.radius is not None and not self.radius > 0):
            raise InputError(f"last must be at least 1 and radius above 0, got {self.last} and {self.radius}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of each of the last steps' batches."""
        engine.notes.add(exact=False)
        for inputs, _, pullback in self.sweep(run, queries.gradients(run, run.final_state), engine.notes):
            yield ScorePart(inputs.example_ids, pullback.scores)

    def sweep(
        self, run: Run, cotangents: StateVectors, notes: Notes, wrt: frozenset[str] = frozenset()
    ) -> Iterator[tuple[StepInputs, int, Pullback]]:
        """Pull the cotangents of the final state back through the last steps; yields u_t, t and the pullback of step t."""
        if not isinstance(run, Trajectory):
            raise NotRecorded("the last steps of training have to be recorded; see `record`.")
        precision = torch.finfo(next(iter(cotangents.params.values())).dtype).eps
        radius = precision ** (1 / 3) if self.radius is None else self.radius
        notes.add(radius=radius)
        costates = cotangents
        for step, state, inputs in run.reverse(self.last):
            pullback = run.update_map.pullback_by_differences(state, inputs, costates, radius, wrt)
            refuse_non_finite(pullback, step)
            costates = pullback.costates
            yield inputs, step, pullback
