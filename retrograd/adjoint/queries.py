"""What is asked of a run: measurements at its states and their gradients."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, NonFinite
from retrograd.params import Params, map_params, map_slots
from retrograd.trajectory import Examples, Run, StateVectors, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.per_example import per_example
from retrograd.trajectory.trajectory import to_device

_AT_ONCE = 64  # queries whose gradients are taken together


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
        batch = self._batch(self.examples.ids, state.params)
        values = self._measured(update_map, state, batch, len(self.examples))
        return values.mean()[None] if self.mean else values

    def gradients(self, run: Run, state: TrainingState, also: Collection[str] = ()) -> StateVectors:
        """Return ∇f_q at ``state`` for all queries, with respect to parameters and to the buffers that training moves.

        Each through its query alone (the mean through all of them): many at a time where the model can be vectorised over
        queries, else one after the other.

        Args:
            run: the run.
            state: where.
            also: buffers that this run did not move, but one before it did.
        """
        moving = moved_buffers(run, state, also)
        inputs = {name: leaf.detach() for name, leaf in state.params.items()}
        inputs |= {name: state.buffers[name].detach() for name in moving}

        def measured(inputs: Params, batch: Any, count: int) -> Tensor:
            params = {name: inputs[name] for name in state.params}
            buffers = {**state.buffers, **{name: inputs[name] for name in moving}}
            return self._measured(run.update_map, TrainingState(params, state.slots, buffers, state.step), batch, count)

        found = {name: leaf.new_zeros(len(self), *leaf.shape) for name, leaf in inputs.items()}
        rows = torch.arange(len(self))
        slices = zip(rows.split(_AT_ONCE), self.ids.split(_AT_ONCE), strict=True)
        for some, ids in [(rows, self.examples.ids)] if self.mean else slices:
            values, grads = self._together(measured, inputs, ids)
            if not torch.isfinite(values).all():
                row = int(torch.isfinite(values).logical_not().nonzero()[0])
                raise NonFinite(f"the measurement of query {int(ids[row])} is {values[row].item()}.")
            for name, leaf in found.items():
                leaf[some] = grads[name]
        slots = map_slots(lambda leaf: leaf.new_zeros(len(self), *leaf.shape), state.slots)
        return StateVectors({name: found[name] for name in state.params}, slots, {name: found[name] for name in moving})

    def _together(self, measured: Callable[..., Tensor], inputs: Params, ids: Tensor) -> tuple[Tensor, Params]:
        """Values and gradients, ``[query]`` and a leading axis ``query`` on every leaf."""
        batch = self._batch(ids, inputs)
        if self.mean:
            with twice_differentiable(own_functions=False):  # for the running statistics of batch norm
                grads, value = torch.func.grad_and_value(lambda point: measured(point, batch, len(ids)).mean())(inputs)
            return value[None], map_params(lambda leaf: leaf[None], grads)

        return per_example(
            lambda point, row: measured(point, row, 1),
            inputs,
            batch,
            len(ids),
            lambda row: self._batch(ids[row : row + 1], inputs),
        )

    def _batch(self, ids: Tensor, beside: Params) -> Any:
        return to_device(self.examples.batch(ids), next(iter(beside.values())).device)

    def _measured(self, update_map: UpdateMap, state: TrainingState, batch: Any, count: int) -> Tensor:
        function = update_map.measurements if self.of == "measurements" else update_map.losses
        values = function(state, batch)
        if values.shape != (count,):
            raise InputError(
                f"{type(update_map.task).__name__}.{self.of} gave shape {tuple(values.shape)} for {count} queries. It "
                f"must give one number per query, shape ({count},)."
            )
        return values


def moved_buffers(run: Run, state: TrainingState, also: Collection[str] = ()) -> list[str]:
    """Return the names of the buffers that have moved since the run began, and of those in ``also``."""
    initial = run.state(0).buffers
    floats = [(name, leaf) for name, leaf in state.buffers.items() if leaf.is_floating_point()]
    return [name for name, leaf in floats if name in also or not torch.equal(leaf, initial[name])]
