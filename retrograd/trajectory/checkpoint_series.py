"""Checkpoints from elsewhere: a run of which only some states are known.

Enough for methods that need no replay (`TracIn`, and later influence functions). Which batches were made is not known, so
every example is taken to have been visited equally often.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.errors import InputError, ModelChanged, NotRecorded
from retrograd.task import AnyTask
from retrograd.trajectory import digests
from retrograd.trajectory.counterfactual import Counterfactual
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.state import TrainingState
from retrograd.trajectory.update_map import UpdateMap
from retrograd.update_rules import SGD


class CheckpointSeries:
    """A list of checkpoints with the learning that lies between them.

    Args:
        model: the module.
        dataset: the training examples.
        task: per-example losses and measurements.
        states: step → ``state_dict`` of the model (from ``torch.load(..., weights_only=True)`` or safetensors); the last
            one is the final model.
        learning_rate: the learning rate, constant or one for each checkpoint (the mean over its stretch of the run). For
            SGD with momentum μ give η/(1−μ).

    >>> from retrograd.task import Regression
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = (torch.ones(4, 1), torch.zeros(4, 1))
    >>> series = CheckpointSeries(model, data, Regression(), {10: {"weight": torch.ones(1, 1)}}, learning_rate=0.1)
    >>> series.exposure([10])                    # 10 steps at 0.1 over 4 examples
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        task: AnyTask,
        states: Mapping[int, Mapping[str, Tensor]],
        *,
        learning_rate: float | Sequence[float],
    ):
        if not states:
            raise InputError("a checkpoint series needs at least one checkpoint.")
        trained = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
        self.update_map = UpdateMap(model, task, SGD(), (trained,))
        self.examples = Examples.of(dataset)
        self.counterfactual = Counterfactual()
        self._states = {step: _state(model, trained, states[step], step) for step in sorted(states)}
        rates = [learning_rate] * len(states) if isinstance(learning_rate, float | int) else list(learning_rate)
        if len(rates) != len(states):
            raise InputError(f"learning_rate needs one number, or one for each of {len(states)} checkpoints, got {len(rates)}.")
        self._rates = dict(zip(self._states, rates, strict=True))

    def __len__(self) -> int:
        """Return the step of the last checkpoint."""
        return max(self._states)

    @property
    def digest(self) -> str:
        """Digest of the data and of all checkpoints."""
        parts = [self.examples.root(), *(digests.state_digest(state) for state in self._states.values())]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    @property
    def final_state(self) -> TrainingState:
        """The last checkpoint."""
        return self._states[len(self)]

    def state(self, step: int) -> TrainingState:
        """Return the checkpoint of ``step``; step 0 stands for the first one that is known."""
        if step == 0:
            return next(iter(self._states.values()))
        if step not in self._states:
            raise NotRecorded(f"there is no checkpoint of step {step}. Given: {', '.join(map(str, self._states))}.")
        return self._states[step]

    def spread(self, count: int) -> list[int]:
        """Return ``count`` of the checkpoints, spread evenly over their list."""
        known = list(self._states)
        return sorted({known[(2 * index + 1) * len(known) // (2 * count)] for index in range(count)})

    def exposure(self, steps: Sequence[int], stops: Sequence[int] | None = None) -> Float[Tensor, "checkpoint example"]:
        """Learning rate × number of steps / N for the stretch of each checkpoint, up to halfway to the next or as given."""
        halfway = [*((left + right) / 2 for left, right in pairwise(steps)), len(self)]
        stops = [0, *(halfway if stops is None else stops)]
        each = [
            self._rates[step] * (stop - start) / len(self.examples)
            for step, start, stop in zip(steps, stops, stops[1:], strict=False)
        ]
        return torch.tensor(each, dtype=torch.float64)[:, None].repeat(1, len(self.examples))

    def step_size(self, state: TrainingState, name: str) -> Tensor | float:
        """Return 1: steps are taken to be plain gradient steps."""
        return 1.0

    @property
    def mean_weight(self) -> float:
        """Return 1: no weights are known."""
        return 1.0

    @property
    def weight_decay(self) -> float:
        """Return 0: no decay is known."""
        return 0.0

    @property
    def shrinkage(self) -> float:
        """Return 0: no decay is known."""
        return 0.0

    def matching(self, counterfactual: Counterfactual) -> "CheckpointSeries":
        """Return this series; another run cannot be made from it.

        Raises:
            NotRecorded: the counterfactual asks for a run of another training time.
        """
        if counterfactual.keep != 1.0:
            raise NotRecorded(
                f"linearising for {counterfactual} needs a run of matched training time, and checkpoints cannot be trained "
                "again. Record the training, or train at the matching learning rate and give those checkpoints with keep=1."
            )
        return self


def _state(model: nn.Module, trained: list[str], values: Mapping[str, Tensor], step: int) -> TrainingState:
    buffers = {name: values.get(name, leaf).detach().clone() for name, leaf in model.named_buffers()}
    missing = [name for name in trained if name not in values]
    if missing:
        raise ModelChanged(f"the checkpoint of step {step} lacks the parameters {missing[:3]} of the model.")
    params = {name: values[name].detach().clone() for name in trained}
    wrong = [name for name, leaf in model.named_parameters() if name in params and params[name].shape != leaf.shape]
    if wrong:
        raise ModelChanged(f"parameters {wrong[:3]} in the checkpoint of step {step} have other shapes than in the model.")
    return TrainingState(params, {}, buffers, step)
