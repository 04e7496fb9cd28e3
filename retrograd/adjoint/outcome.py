"""Any number asked of a trained model, as a function of it: what a hypergradient is the gradient of."""

from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.adjoint.queries import Queries, moved_buffers
from retrograd.errors import InputError, NonFinite
from retrograd.params import map_slots
from retrograd.trajectory import Run, StateVectors, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable


class Outcome:
    """A function of the trained model: a scalar, or one number for each of several questions.

    Args:
        function: gets the model in evaluation mode and returns a scalar or a vector ``[query]``, differentiable in its
            parameters. It must draw no random numbers.

    >>> outcome = Outcome(lambda model: model.weight.square().sum())
    """

    def __init__(self, function: Callable[[nn.Module], Tensor]):
        self.function = function

    @staticmethod
    def of(outcome: Any) -> "Outcome | Queries":
        """Return ``outcome`` itself if it is one, wrap a function, or ask for the mean measurement over data."""
        if isinstance(outcome, Outcome | Queries):
            return outcome
        return Outcome(outcome) if isinstance(outcome, FunctionType) else Queries(outcome, mean=True)

    def values(self, update_map: UpdateMap, state: TrainingState) -> Float[Tensor, " query"]:
        """Evaluate at ``state``, differentiably."""
        values = update_map.ask(self.function, state)
        if values.dim() > 1:
            raise InputError(f"an outcome is a scalar or a vector with one number a question, got shape {tuple(values.shape)}.")
        return values.reshape(-1)

    def gradients(self, run: Run, state: TrainingState, also: Collection[str] = ()) -> StateVectors:
        """Return ∇f_q at ``state``, by parameters and by the buffers that training moves, and those in ``also``."""
        params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        moving = {name: state.buffers[name].detach().requires_grad_() for name in moved_buffers(run, state, also)}
        leaves = [*params.values(), *moving.values()]
        with twice_differentiable():  # for the running statistics of batch norm
            values = self.values(run.update_map, TrainingState(params, {}, {**state.buffers, **moving}, state.step))
        if not torch.isfinite(values).all():
            raise NonFinite(f"the outcome is {values.detach().tolist()}.")
        rows = [torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) for value in values]
        found = [
            torch.stack([torch.zeros_like(leaf) if row[place] is None else row[place] for row in rows])
            for place, leaf in enumerate(leaves)
        ]
        slots = map_slots(lambda leaf: leaf.new_zeros(len(values), *leaf.shape), state.slots)
        names = len(params)
        return StateVectors(dict(zip(params, found[:names], strict=True)), slots, dict(zip(moving, found[names:], strict=True)))
