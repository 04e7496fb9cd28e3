"""What a training run is made of: states, the inputs of each step, and vectors that travel along the run.

    s_{t+1} = Φ_t(s_t, u_t)        s = TrainingState,  u = StepInputs

The tangents that run forward and the costates that run backward are shaped like states with one axis more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograd.params import Params, Slots, map_params, map_slots
from retrograd.update_rules import Hyper

ROUNDING = 16  # units in the last place that a replay may differ by where its bits are not those of the run


@dataclass(frozen=True)
class TrainingState:
    """The state s_t before step ``step``: parameters, optimizer slots and module buffers."""

    params: Params
    slots: Slots
    buffers: Params
    step: int

    def map(self, function: Callable[[Tensor], Tensor]) -> "TrainingState":
        """Apply ``function`` to every tensor."""
        return TrainingState(
            map_params(function, self.params),
            map_slots(function, self.slots),
            map_params(function, self.buffers),
            self.step,
        )

    def clone(self) -> "TrainingState":
        """Return a copy that shares no memory with this state."""
        return self.map(lambda leaf: leaf.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names: ``params/…``, ``slots/<slot>/…``, ``buffers/…``."""
        flat = {f"params/{name}": leaf for name, leaf in self.params.items()}
        flat |= {f"slots/{slot}/{name}": leaf for slot, leaves in self.slots.items() for name, leaf in leaves.items()}
        return flat | {f"buffers/{name}": leaf for name, leaf in self.buffers.items()}

    @staticmethod
    def from_tensors(flat: dict[str, Tensor], step: int) -> "TrainingState":
        """Undo `tensors`."""
        params: Params = {}
        slots: Slots = {}
        buffers: Params = {}
        for key, leaf in flat.items():
            kind, name = key.split("/", 1)
            if kind == "params":
                params[name] = leaf
            elif kind == "slots":
                slot, name = name.split("/", 1)
                slots.setdefault(slot, {})[name] = leaf
            else:
                buffers[name] = leaf
        return TrainingState(params, slots, buffers, step)

    def nbytes(self) -> int:
        """Bytes of memory that this state takes."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.tensors().values())

    def equals(self, other: "TrainingState") -> bool:
        """Whether both hold the same bits."""
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def difference(self, other: "TrainingState", before: "TrainingState") -> float:
        """Largest difference to ``other``, beyond rounding, as a share of how far ``other`` moved from ``before``.

        Taken tensor by tensor; infinite where ``other`` did not move at all but this state did.
        """
        worst = 0.0
        theirs, earlier = other.tensors(), before.tensors()
        for name, leaf in self.tensors().items():
            if leaf.numel() == 0 or torch.equal(leaf, theirs[name]):
                continue
            error = (leaf.double() - theirs[name].double()).abs().max().item()
            moved = (theirs[name].double() - earlier[name].double()).abs().max().item()
            eps = torch.finfo(leaf.dtype).eps if leaf.is_floating_point() else 0.0
            excess = error - ROUNDING * eps * theirs[name].double().abs().max().item()
            if not excess <= 0:
                worst = max(worst, excess / moved if moved else float("inf"))
        return worst


@dataclass(frozen=True)
class StepInputs:
    """The inputs u_t of one step.

    Attributes:
        example_ids: ids of the examples of the batch, shape ``[B]``.
        weights: their weights w_i, shape ``[B]`` float64, or None for all ones.
        hyper: numeric hyperparameters, one dict for each parameter group.
        batch: what the task's ``losses`` gets.
        seed: seed of every random number drawn inside the step (dropout, noise).
        step: number t of the step, which a meta-module may depend on.
        meta: parameters of the meta-module, or None for those that the update map holds.
    """

    example_ids: Tensor
    weights: Tensor | None
    hyper: tuple[Hyper, ...]
    batch: Any
    seed: int
    step: int = 0
    meta: Params | None = None


@dataclass(frozen=True)
class StepRecord:
    """What is recorded of one step.

    Attributes:
        example_ids: ids of the batch, shape ``[B]`` int64.
        weights: example weights, shape ``[B]`` float64, or None for all ones.
        hyper: hyperparameters of each parameter group.
        seed: seed of the step's random numbers.
        loss: the loss before the step, if known.
        witness: a cheap fingerprint of the parameters after the step (see `trajectory.witness`).
    """

    example_ids: Tensor
    weights: Tensor | None
    hyper: tuple[Hyper, ...]
    seed: int
    loss: float | None
    witness: float | None


@dataclass(frozen=True)
class StateVectors:
    """A batch of vectors shaped like a state: tangents (pushed forward) or costates (pulled back).

    Every leaf has one leading axis (``tangent`` or ``query``). Buffers that training never moves are left out: along them
    the update map is the identity. A slot or buffer that is left out is zero.
    """

    params: Params
    slots: Slots
    buffers: Params

    def __len__(self) -> int:
        """Return the number of vectors."""
        return next(iter(self.params.values())).shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "StateVectors":
        """Apply ``function`` to every leaf."""
        return StateVectors(
            map_params(function, self.params), map_slots(function, self.slots), map_params(function, self.buffers)
        )

    def __getitem__(self, index: slice) -> "StateVectors":
        """Return the vectors of a slice of the leading axis."""
        return self.map(lambda leaf: leaf[index])

    def leaves(self) -> dict[str, Tensor]:
        """All leaves under flat names, as in `TrainingState.tensors`."""
        return TrainingState(self.params, self.slots, self.buffers, 0).tensors()

    @staticmethod
    def cat(parts: "list[StateVectors]") -> "StateVectors":
        """Concatenate along the leading axis."""
        first = parts[0]
        return StateVectors(
            {name: torch.cat([part.params[name] for part in parts]) for name in first.params},
            {
                slot: {name: torch.cat([part.slots[slot][name] for part in parts]) for name in leaves}
                for slot, leaves in first.slots.items()
            },
            {name: torch.cat([part.buffers[name] for part in parts]) for name in first.buffers},
        )

    def inner(self, other: "StateVectors") -> Tensor:
        """Inner products vector by vector, shape ``[query]``; leaves that either one lacks count as zero."""
        mine, theirs = self.leaves(), other.leaves()
        return torch.stack(
            [(mine[name] * theirs[name]).reshape(len(self), -1).sum(1) for name in mine if name in theirs],
        ).sum(0)


def map_batch(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply ``function`` to every tensor of a batch: a tensor, or tuples, lists and dicts of batches."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple | list):
        return type(batch)(map_batch(function, part) for part in batch)
    if isinstance(batch, dict):
        return {name: map_batch(function, part) for name, part in batch.items()}
    return batch
