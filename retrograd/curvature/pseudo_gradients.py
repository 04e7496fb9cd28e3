"""Gradients of the examples' losses with targets drawn from the model itself, the raw material of every Fisher matrix.

    F = (1/N) Σ_n E_{y ~ p(·|x_n)} [g_n g_nᵀ]        g_n = ∇_θ ℓ(x_n, y)

For losses −log p this is the Gauss-Newton matrix; with the true labels in place of drawn ones (the "empirical Fisher") it is
not. Targets are drawn example by example from the example's id, the state's step and the seed, so that results do not
depend on how examples are batched.

Assumptions: the task can draw its own targets (`retrograd.task.Samples`); examples do not touch each other in evaluation mode.
Cost: one forward pass for the draw besides the pass itself.

References: Kunstner, Balles, Hennig (2019), "Limitations of the empirical Fisher approximation".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.noise import Noise
from retrograd.params import Params
from retrograd.progress import track
from retrograd.task import BoundModel, Samples
from retrograd.trajectory import Examples, TrainingState, UpdateMap
from retrograd.trajectory.modes import evaluation_mode
from retrograd.trajectory.per_example import loss_gradients
from retrograd.trajectory.state import map_batch
from retrograd.trajectory.trajectory import to_device

SCALARS_AT_ONCE = 1 << 24  # per-example gradients and per-example matrices are taken in slices of so many numbers


@dataclass(frozen=True)
class PseudoBatches:
    """Batches of training examples whose targets are drawn from the model.

    Attributes:
        update_map: model and task.
        examples: the training examples.
        ids: those to use.
        batch_size: how many at once; results do not depend on it.
        samples: draws for each example.
        seed: of the draws.
        states: where; each weighs the same.
    """

    update_map: UpdateMap
    examples: Examples
    ids: Tensor
    batch_size: int
    samples: int
    seed: int
    states: Sequence[TrainingState]

    def __post_init__(self):
        if not self.states:
            raise InputError("curvature needs at least one state, got none.")
        if self.batch_size < 1 or self.samples < 1 or not len(self.ids):
            raise InputError(
                f"curvature needs at least one example, one sample and a batch size of 1; got {len(self.ids)} examples, "
                f"samples={self.samples}, batch_size={self.batch_size}."
            )
        if not isinstance(self.update_map.task, Samples):
            raise InputError(
                f"{type(self.update_map.task).__name__} cannot draw targets from its own model, which curvature needs. Give "
                "it a method sampled(model, batch, noise) that returns the batch with targets drawn from what model predicts "
                "(see retrograd.task.Samples)."
            )

    @property
    def count(self) -> int:
        """How many pseudo-gradients there are in all."""
        return len(self.ids) * self.samples * len(self.states)

    def over(self, phase: str) -> Iterator[tuple[int, TrainingState, int, Any]]:
        """Yield ``(index of the state, state, number of examples, batch)``; each example ``samples`` times at each state."""
        parts = self.ids.split(self.batch_size)
        work = [(index, draw, ids) for index in range(len(self.states)) for draw in range(self.samples) for ids in parts]
        for index, draw, ids in track(work, phase):
            yield index, self.states[index], len(ids), self.batch(self.states[index], ids, draw)

    def batch(self, state: TrainingState, ids: Tensor, draw: int = 0) -> Any:
        """Return the examples ``ids`` with targets drawn at ``state``."""
        update_map = self.update_map
        assert isinstance(update_map.task, Samples)
        batch = to_device(self.examples.batch(ids), device_of(state))
        noise = Noise(ids, self.seed, state.step, draw)
        with evaluation_mode(update_map.model), torch.no_grad():
            return BoundModel(update_map.model)(update_map.task.sampled, {**state.params, **state.buffers}, batch, noise)


def device_of(state: TrainingState) -> torch.device:
    """Where a state lives."""
    return next(iter(state.params.values())).device


def chosen(examples: Examples, choice: int | Sequence[int] | None, seed: int, among: Tensor | None = None) -> Tensor:
    """Return the ids to use: all, so many drawn at random, or those given; only from ``among``, if that is given."""
    among = examples.ids if among is None else among
    if choice is None:
        return among
    if isinstance(choice, int):
        if not 1 <= choice <= len(among):
            raise InputError(f"examples={choice}, but there are {len(among)}: give a number from 1 to that, or ids.")
        order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))
        return among.sort().values[order[:choice]].sort().values  # by id, so that the order of rows does not matter
    ids = torch.as_tensor(choice, dtype=torch.int64)
    examples.rows(ids)
    return ids[torch.isin(ids, among)]


def per_example_gradients(
    update_map: UpdateMap, state: TrainingState, batch: Any, size: int, names: Sequence[str]
) -> Iterator[Params]:
    """Yield ∇ℓ_i with respect to the parameters ``names``, for slices of the batch's ``size`` examples in order."""
    width = sum(state.params[name].numel() for name in names)
    step = max(1, SCALARS_AT_ONCE // max(width, 1))
    for start in range(0, size, step):
        part = map_batch(lambda leaf, start=start: leaf[start : start + step], batch)
        yield loss_gradients(update_map, state, part, min(step, size - start), tuple(names))
