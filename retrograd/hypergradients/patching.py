"""Patching by interpolation: how far to go from where training began to where it ended.

    θ(α) = θ_0 + α (θ_T − θ_0),      d f(θ(α)) / dα = ⟨∇f(θ(α)), θ_T − θ_0⟩

Fine-tuning on one task costs accuracy on others; part of the way often keeps most of both. α = 1 is the model that was trained,
0 the one it began with. A recorded run has both ends, so the slope is one gradient, and derivatives of the patched model by
what went into training are those of an ordinary outcome: `Patched` is one, with d θ(α) / d θ_T = α.

Assumptions: parameters are interpolated, and those buffers that training moved; the path between the two has no barrier (true
of fine-tuning from a good start, not of training from scratch). Cost: a pass over the questions for each α.

Reference: Ilharco et al. (2022), "Patching open-vocabulary models by interpolating weights", equation 1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.adjoint import Outcome
from retrograd.adjoint.queries import moved_buffers
from retrograd.errors import InputError
from retrograd.params import Params
from retrograd.trajectory import Run, StateVectors, TrainingState, Trajectory, UpdateMap


@dataclass(frozen=True)
class Patching:
    """An outcome along the way from the beginning of training to its end.

    Attributes:
        alphas: how far along, [point].
        values: the outcome there, [point, query].
        slopes: its derivative by α, [point, query].
    """

    alphas: Float[Tensor, " point"]
    values: Float[Tensor, "point query"]
    slopes: Float[Tensor, "point query"]

    citation: ClassVar[str] = """@inproceedings{ilharco2022patching,
  title = {Patching Open-Vocabulary Models by Interpolating Weights},
  author = {Ilharco, Gabriel and Wortsman, Mitchell and others},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2022}
}"""

    @property
    def best(self) -> float:
        """Where the mean outcome is smallest."""
        return self.alphas[self.values.mean(1).argmin()].item()


class Patched(Outcome):
    """An outcome of the model that is ``alpha`` of the way along, as a function of where training ends.

    Args:
        run: gives the beginning.
        outcome: what is asked of the patched model.
        alpha: α.
    """

    def __init__(self, run: Run, outcome: Any, alpha: float):
        self._asked, self._start, self.alpha = Outcome.of(outcome), run.state(0), alpha

    def values(self, update_map: UpdateMap, state: TrainingState) -> Float[Tensor, " query"]:
        """Evaluate at the patched model, differentiably in the end of training."""
        return self._asked.values(update_map, self._between(state))

    def gradients(self, run: Run, state: TrainingState, also: Collection[str] = ()) -> StateVectors:
        """Return the gradients by the end of training: α times those at the patched model."""
        found = self.gradients_between(run, state, {*also, *moved_buffers(run, state)})
        return found.map(lambda leaf: self.alpha * leaf)

    def gradients_between(self, run: Run, state: TrainingState, moved: Collection[str]) -> StateVectors:
        """Return the gradients by the patched model itself; ``moved`` names the buffers that count."""
        return self._asked.gradients(run, self._between(state), moved)

    def _between(self, state: TrainingState) -> TrainingState:
        def mixed(end: Params, start: Params) -> Params:
            return {
                name: start[name] + self.alpha * (leaf - start[name]) if leaf.is_floating_point() else leaf
                for name, leaf in end.items()
            }

        return replace(state, params=mixed(state.params, self._start.params), buffers=mixed(state.buffers, self._start.buffers))


def patch(run: Trajectory, outcome: Any, alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Patching:
    """Evaluate an outcome, and its slope, along the straight way from the beginning of a run to its end.

    Args:
        run: a recorded run.
        outcome: as for `hypergradient`.
        alphas: how far along; values beyond 0 to 1 extrapolate.

    Raises:
        InputError: no point is given.
    """
    if not len(alphas):
        raise InputError("give at least one alpha.")
    start, end = run.state(0), run.final_state
    moved = moved_buffers(run, end)
    moves = {name: leaf - start.params[name] for name, leaf in end.params.items()}
    moves |= {name: end.buffers[name] - start.buffers[name] for name in moved}
    values, slopes = [], []
    for alpha in alphas:
        asked = Patched(run, outcome, float(alpha))
        values.append(asked.values(run.update_map, end).detach())
        found = asked.gradients_between(run, end, moved)
        slopes.append(
            sum((leaf * moves[name]).reshape(len(leaf), -1).sum(1) for name, leaf in {**found.params, **found.buffers}.items())
        )
    return Patching(torch.tensor(alphas, dtype=torch.float64), torch.stack(values), torch.stack(slopes))
