"""What an optimizer multiplies gradients with, as approximate methods see it: −dθ/dg in the long run."""

from collections.abc import Sequence

import torch

from retrograd.params import Params, map_params
from retrograd.trajectory import Run, TrainingState


def preconditioner(run: Run, states: Sequence[TrainingState]) -> tuple[float, Params | None]:
    """Return (P, None) where all parameters have one step size, else (1, P^½), averaged over the states."""
    sizes = [
        {name: torch.as_tensor(run.step_size(state, name), dtype=torch.float64) for name in run.update_map.names}
        for state in states
    ]
    mean = {name: torch.stack([own[name] for own in sizes]).mean(0) for name in run.update_map.names}
    flat = {leaf.item() for leaf in mean.values() if leaf.numel() == 1}
    if len(flat) == 1 and all(leaf.numel() == 1 for leaf in mean.values()):
        return flat.pop(), None
    like = states[0].params
    return 1.0, {name: leaf.sqrt().to(like[name]).expand_as(like[name]) for name, leaf in mean.items()}


def times(vectors: Params, scale: Params | None) -> Params:
    """Multiply vectors with a leading axis by P^½."""
    return vectors if scale is None else map_params(torch.mul, vectors, scale)


def mean_square(scale: Params | None) -> float:
    """The mean of P, 1 where it is in the flow."""
    if scale is None:
        return 1.0
    return sum(leaf.double().square().sum().item() for leaf in scale.values()) / sum(leaf.numel() for leaf in scale.values())
