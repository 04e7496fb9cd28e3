"""Fresh starts of a recorded training: what retraining with other seeds, and results that hold from any start, begin with."""

from collections.abc import Callable

import torch
from torch import nn

from retrograd.errors import ModelChanged
from retrograd.params import Params
from retrograd.trajectory.state import TrainingState
from retrograd.trajectory.trajectory import Trajectory

Initialise = Callable[[int], nn.Module]
"""Makes a model from a seed; torch's global generator is seeded with it meanwhile."""


def fresh_model(initialise: Initialise, seed: int) -> nn.Module:
    """Return ``initialise(seed)``; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return initialise(seed)


def fresh_start(run: Trajectory, initialise: Initialise, seed: int) -> TrainingState:
    """Return the initial state that ``initialise`` makes from a seed.

    Args:
        run: the recorded run.
        initialise: makes a model like the recorded one.
        seed: a fresh seed, with which torch's global generator is seeded meanwhile.

    Raises:
        ModelChanged: it is another model: names, shapes or frozen parameters differ.
    """
    model = fresh_model(initialise, seed)
    recorded, own = run.state(0), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    frozen = {name: leaf for name, leaf in run.update_map.model.named_parameters() if name not in recorded.params}
    for name, leaf in {**recorded.params, **recorded.buffers, **frozen}.items():
        if name not in own or own[name].shape != leaf.shape or own[name].dtype != leaf.dtype:
            raise ModelChanged(f"initialise({seed}) gave another kind of model than the recorded one: {name} differs.")
        if name in frozen and not torch.equal(own[name].to(leaf.device), leaf):
            raise ModelChanged(f"initialise({seed}) changed {name}, which is not trained; it must stay as it was.")

    def fresh(leaves: Params) -> Params:
        return {name: own[name].detach().to(leaf.device).clone() for name, leaf in leaves.items()}

    return TrainingState(fresh(recorded.params), recorded.slots, fresh(recorded.buffers), 0)
