"""What is asked of a run: measurements at its states and their gradients."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, NonFinite
from retrograd.params import map_slots
from retrograd.trajectory import Examples, Run, StateVectors, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.trajectory import to_device


class Queries:
    """Questions to a run: one number f_q for each query, the task's ``measurements`` (or its ``losses``).

    Args:
        data: the queries, anything that `Examples` takes.
        of: ``"measurements"``, or ``"losses"`` to ask for the training loss of each query.
        mean: ask one question, for the mean over all of them, which costs as much as one query.
    """

    def __init__(self, data: Any, of: str = "measurements", *, mean: bool = False):
        self.examples = Examples.of(data)
        if not len(self.examples):
            raise InputError("there are no queries.")
        if of not in ("measurements", "losses"):
            raise InputError(f"queries ask for 'measurements' or 'losses', got {of!r}.")
        self.of, self.mean = of, mean
        self.ids = torch.zeros(1, dtype=torch.int64) if mean else self.examples.ids

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.ids)

    def slices(self, size: int | None) -> list["Queries"]:
        """Cut into parts of at most ``size`` queries."""
        if size is not None and size < 1:
            raise InputError(f"query_batch must be at least 1, got {size}.")
        if size is None or size >= len(self):
            return [self]
        parts = []
        for ids in self.ids.split(size):
            parts.append(Queries(Examples(self.examples.batch(ids), ids), self.of))
        return parts

    def values(self, update_map: UpdateMap, state: TrainingState) -> Float[Tensor, " query"]:
        """Evaluate f_q at ``state``, differentiably."""
        values = self._ask(update_map, state, self.examples.ids)
        return values.mean()[None] if self.mean else values

    def gradients(self, run: Run, state: TrainingState) -> StateVectors:
        """Return ∇f_q at ``state`` for all queries, with respect to parameters and to the buffers that training moves.

        One backward pass for each query, through that query alone (for the mean, through all of them).
        """
        initial = run.state(0)
        moving = [
            name
            for name, leaf in state.buffers.items()
            if leaf.is_floating_point() and not torch.equal(leaf, initial.buffers[name])
        ]
        params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        buffers = {name: leaf.detach() for name, leaf in state.buffers.items()}
        buffers |= {name: buffers[name].requires_grad_() for name in moving}
        inputs = {**params, **{name: buffers[name] for name in moving}}
        found = {name: leaf.new_zeros(len(self), *leaf.shape) for name, leaf in inputs.items()}
        bound = TrainingState(params, state.slots, buffers, state.step)
        for row, query in enumerate([self.examples.ids] if self.mean else self.ids.split(1)):
            with twice_differentiable(own_functions=False):  # for the running statistics of batch norm
                value = self._ask(run.update_map, bound, query).mean()
            if not torch.isfinite(value.detach()):
                raise NonFinite(f"the measurement of query {query.tolist()[:3]} is {value.item()}.")
            grads = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
            for leaf, grad in zip(found.values(), grads, strict=True):
                if grad is not None:
                    leaf[row] = grad
        slots = map_slots(lambda leaf: leaf.new_zeros(len(self), *leaf.shape), state.slots)
        return StateVectors({name: found[name] for name in params}, slots, {name: found[name] for name in moving})

    def _ask(self, update_map: UpdateMap, state: TrainingState, ids: Tensor) -> Tensor:
        device = next(iter(state.params.values())).device
        batch = to_device(self.examples.batch(ids), device)
        function = update_map.measurements if self.of == "measurements" else update_map.losses
        values = function(state, batch)
        if values.shape != (len(ids),):
            raise InputError(
                f"{type(update_map.task).__name__}.{self.of} gave shape {tuple(values.shape)} for {len(ids)} queries. It "
                f"must give one number per query, shape ({len(ids)},)."
            )
        return values
