"""The course of a retraining: which batch, with which weights and hyperparameters, makes each of its steps.

A retraining is the recorded run with one thing changed, and what "changed" means is said here:

* ``removal="zero_weight"``: the recorded batches; each example's recorded weight is multiplied by a factor, 0 where it is
  removed. The batch keeps its size B as denominator.
* ``removal="deletion"``: the removed examples leave the data set. What is left is shuffled anew for each epoch and cut to
  batches of the recorded size. ``hold="epochs"`` goes through it as often as the run went through its data, in fewer steps;
  ``hold="steps"`` makes as many steps, in more epochs. Recorded hyperparameters are stretched over the course.

With a fresh ``seed`` the order of the batches and the random numbers inside the steps are new as well; without one they
are the recorded ones (but for the shuffles of a deletion, which the record cannot know).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.trajectory import Examples, StepInputs, Trajectory, batch_order
from retrograd.trajectory.counterfactual import Removal
from retrograd.trajectory.modes import step_seed
from retrograd.trajectory.state import map_batch
from retrograd.trajectory.trajectory import to_device
from retrograd.update_rules import Hyper

Hold = Literal["epochs", "steps"]


@dataclass(frozen=True)
class Epochs:
    """How a run went through its data.

    Attributes:
        batch_size: examples in a full batch.
        drop_last: whether an incomplete batch at the end of an epoch was left out.
    """

    batch_size: int
    drop_last: bool

    def steps(self, examples: int) -> int:
        """Return the number of steps in an epoch over so many examples."""
        size = min(self.batch_size, examples)
        return examples // size if self.drop_last else -(-examples // size)

    def order(self, ids: Tensor, steps: int, seed: int) -> list[Tensor]:
        """Shuffle ``ids`` anew for each epoch and cut them to the batches of ``steps`` steps."""
        size, in_epoch = min(self.batch_size, len(ids)), self.steps(len(ids))
        batches = batch_order(Examples(torch.zeros(len(ids)), ids), -(-steps // in_epoch), size, seed)
        whole = (batch for batch in batches if not self.drop_last or len(batch) == size)
        return list(islice(whole, steps))

    @staticmethod
    def of(run: Trajectory) -> "Epochs":
        """Read off the record how the run went through its data.

        Raises:
            InputError: it did not go through it in epochs, each example once.
        """
        total, ids = len(run.examples), [record.example_ids for record in run.records]
        size = max((len(batch) for batch in ids), default=1)
        for drop_last in (False, True):
            found = Epochs(size, drop_last)
            in_epoch = found.steps(total)
            sizes = [size if (step + 1) % in_epoch or drop_last else total - size * (in_epoch - 1) for step in range(len(ids))]
            epochs = [torch.cat(ids[start : start + in_epoch]) for start in range(0, len(ids), in_epoch)]
            if sizes == [len(batch) for batch in ids] and all(len(epoch.unique()) == len(epoch) for epoch in epochs):
                return found
        raise InputError(
            "this run did not go through its data in epochs, each example once in batches of one size. So nobody can say how "
            "it would have gone through other data: only removal='zero_weight' with the recorded order is defined."
        )


@dataclass(frozen=True)
class Protocol:
    """What all retrainings of a study share: the run that is varied, and how.

    Attributes:
        run: the recorded run.
        removal: how examples leave.
        hold: what stays the same when examples are deleted.
        seed: seed of the shuffles of deletions that otherwise keep the recorded seeds.
    """

    run: Trajectory
    removal: Removal
    hold: Hold
    seed: int

    def length(self, kept: int) -> int:
        """Return the number of steps of a retraining on so many examples."""
        total = len(self.run)
        if self.removal == "zero_weight" or self.hold == "steps":
            return total
        return max(round(total * self.epochs.steps(kept) / self.epochs.steps(len(self.run.examples))), 1)

    @cached_property
    def epochs(self) -> Epochs:
        """How the run went through its data."""
        return Epochs.of(self.run)


class Course:
    """The steps that some retrainings make side by side.

    Args:
        protocol: what they share.
        factors: factor on each example's weight, shape ``[model, example]``. Deletion deletes those of factor 0,
            equally many in each row.
        numbers: number of each retraining in its study, which seeds its shuffles; shape ``[model]``.
        seed: seed of the training, None for the recorded order and random numbers.
    """

    def __init__(self, protocol: Protocol, factors: Tensor, numbers: Tensor, seed: int | None):
        run = protocol.run
        self._run, self._seed, self._factors = run, seed, factors
        self._dtype = next(iter(run.update_map.model.parameters())).dtype
        self.own_batches = protocol.removal == "deletion"
        self._weights = None if seed is None and not self.own_batches else example_weights(run)
        self._orders: list[list[Tensor]] | None = None  # one for all models, or one for each
        length = len(run)
        if self.own_batches:
            base = protocol.seed if seed is None else seed
            kept = [run.examples.ids[row != 0] for row in factors]
            length = protocol.length(len(kept[0]))
            self._orders = [
                protocol.epochs.order(ids, length, step_seed(base, number))
                for ids, number in zip(kept, numbers.tolist(), strict=True)
            ]
        elif seed is not None:
            self._orders = [protocol.epochs.order(run.examples.ids, length, seed)]
        self._length = length

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._length

    def step(self, number: int) -> tuple[StepInputs, Tensor]:
        """Return the inputs of a step, and the weights of its batch for each model, ``[model, batch]``.

        If `own_batches`, the batch's tensors have a leading axis ``model``.
        """
        run = self._run
        if self._orders is None:
            inputs = run.inputs(number)
            weights = self._factors[:, run.examples.rows(inputs.example_ids)].double()
            weights = weights if inputs.weights is None else weights * inputs.weights
        else:
            assert self._weights is not None
            ids = torch.stack([order[number] for order in self._orders])
            seed = run.records[number].seed if self._seed is None else step_seed(self._seed, number)
            flat = to_device(run.examples.batch(ids.flatten()), run.device)
            batch = map_batch(lambda leaf: leaf.unflatten(0, ids.shape), flat) if self.own_batches else flat
            inputs = StepInputs(ids[0], None, self._hyper(number), batch, seed, number)
            rows = run.examples.rows(ids.flatten()).view_as(ids)
            weights = self._weights[rows] * self._factors.gather(1, rows.expand(len(self._factors), -1))
        return inputs, weights.to(run.device, self._dtype)

    def _hyper(self, number: int) -> tuple[Hyper, ...]:
        """The recorded hyperparameters at the same share of the course; a count of steps goes on counting."""
        records = self._run.records
        hyper = records[number * len(records) // self._length].hyper
        hyper = tuple({**own, "step": number + 1.0} if "step" in own else dict(own) for own in hyper)
        if number:  # torch has no dampening in the first step, and that step is recorded so
            lasting = [own.get("dampening") for own in records[-1].hyper]
            hyper = tuple(
                own if value is None else {**own, "dampening": value} for own, value in zip(hyper, lasting, strict=True)
            )
        return hyper


def example_weights(run: Trajectory) -> Tensor:
    """Return the recorded weight of each example, 1 for those never seen.

    Raises:
        InputError: an example weighs more at one visit than at another.
    """
    weights = torch.full((len(run.examples),), torch.nan, dtype=torch.float64)
    for record in run.records:
        rows = run.examples.rows(record.example_ids)
        own = torch.ones(len(rows), dtype=torch.float64) if record.weights is None else record.weights
        if not ((weights[rows] == own) | weights[rows].isnan()).all():
            raise InputError(
                "in this run the weight of an example changes from step to step, so it has none in another order. Only "
                "removal='zero_weight' with the recorded order is defined."
            )
        weights[rows] = own
    return weights.nan_to_num(nan=1.0)
