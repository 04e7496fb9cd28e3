"""Fresh starts of a recorded training: what `vary` of `meta_train` and `audit` says for results that hold from any start."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from retrograd.errors import ModelChanged
from retrograd.params import Params
from retrograd.trajectory import TrainingState, Trajectory

Initialise = Callable[[int], nn.Module]
"""Makes a model from a number; called with torch's global generator seeded by it."""


def fresh_model(initialise: Initialise, seed: int) -> nn.Module:
    """Return ``initialise(seed)``; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return initialise(seed)


def fresh_start(run: Trajectory, initialise: Initialise, seed: int) -> TrainingState:
    """Return the recorded first state with parameters and buffers of a new model: ``initial=`` of `Trajectory.rerun`.

    Raises:
        ModelChanged: ``initialise`` makes another kind of model.
    """
    model, first = fresh_model(initialise, seed), run.state(0)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def fresh(leaves: Params) -> Params:
        wrong = [name for name, leaf in leaves.items() if name not in own or own[name].shape != leaf.shape]
        if wrong:
            raise ModelChanged(f"initialise({seed}) gave another kind of model than the recorded one: {wrong[0]} differs.")
        return {name: own[name].detach().to(leaf).clone() for name, leaf in leaves.items()}

    return replace(first, params=fresh(first.params), buffers=fresh(first.buffers))
