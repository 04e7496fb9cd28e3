"""How rough training is: whether a derivative of the run says anything about a finite change.

**Metasmoothness** (Engstrom et al. 2025, definition 2): train with weights 1, 1 + h v and 1 + 2 h v, v ~ N(0, I), and
compare the signs of the two moves of each parameter, weighted by how far it moved in all:

    S = Σ_p |d_p| / ‖d‖₁ · sign(θ_h − θ_0)_p · sign(θ_2h − θ_h)_p,        d = θ_2h − θ_0

1: the parameters respond to the weights along straight lines. 0: their moves are unrelated.

**Amplification of rounding**: train from initial parameters of which each is moved by a random ±1 unit of its last place,
and compare how far the final parameters moved with how far the initial ones did,

    a = ‖θ'_T − θ_T‖ / ‖θ'_0 − θ_0‖.

A run that amplifies the smallest changes will do so with every change: its derivative is large, and soon wrong. (ln a)/T is the
run's finite-time Lyapunov exponent in that direction; `retrograd.lyapunov_exponents` says where on the way it arises.

Cost: three trainings (the run itself is the first of the four). Thresholds: see ``docs/roughness.md`` for the measurements
behind them.
"""

import math
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.errors import RoughTraining
from retrograd.params import flatten
from retrograd.trajectory.schedule import Treeverse
from retrograd.trajectory.trajectory import Trajectory

SMOOTH_ENOUGH = 0.25
AMPLIFICATION_LIMIT = 10.0


@dataclass(frozen=True)
class Roughness:
    """What `roughness` measured.

    Attributes:
        metasmoothness: S in [−1, 1].
        amplification: growth of a perturbation of the size of rounding, initial to final parameters.
        steps: length of the run.
    """

    metasmoothness: float
    amplification: float
    steps: int

    @property
    def exponent(self) -> float:
        """Finite-time Lyapunov exponent: growth of that perturbation per step, natural logarithm."""
        return math.log(max(self.amplification, sys.float_info.min)) / self.steps

    @property
    def rough(self) -> bool:
        """Whether either number is beyond the threshold at which exact scores stopped predicting retraining."""
        return self.metasmoothness < SMOOTH_ENOUGH or self.amplification > AMPLIFICATION_LIMIT

    def __str__(self) -> str:
        """Give both numbers and the verdict."""
        verdict = "rough: exact derivatives predict little" if self.rough else "smooth enough to differentiate"
        amplified = f"rounding amplified {self.amplification:.3g}x (exponent {self.exponent:.2g} a step)"
        return f"metasmoothness {self.metasmoothness:.3f}, {amplified}: {verdict}"


def roughness(run: Trajectory, *, size: float = 0.05, seed: int = 0) -> Roughness:
    """Measure metasmoothness and the amplification of rounding by three more trainings.

    Args:
        run: a recorded run.
        size: h, the size of the changes of weight.
        seed: seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(run.examples), generator=generator, dtype=torch.float64)
    ends_only = Treeverse(states=1)
    at = [_final(run)]
    at += [_final(run.rerun(weights=1 + factor * size * direction, schedule=ends_only)) for factor in (1, 2)]
    whole = at[2] - at[0]
    agreement = torch.sign(at[1] - at[0]) * torch.sign(at[2] - at[1])
    metasmoothness = ((whole.abs() / whole.abs().sum().clamp(min=torch.finfo(whole.dtype).tiny)) * agreement).sum().item()

    start = run.state(0)
    moved = start.map(lambda leaf: leaf)
    for name, leaf in start.params.items():
        signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device) * 2 - 1
        moved.params[name] = torch.nextafter(leaf, leaf + signs.to(leaf))
    before = (flatten(moved.params.values()).double() - flatten(start.params.values()).double()).norm()
    after = (_final(run.rerun(initial=moved, schedule=ends_only)) - at[0]).norm()
    return Roughness(metasmoothness, (after / before).item(), len(run))


def warn_if_rough(found: Roughness) -> None:
    """Warn that derivatives of a rough run are not to be trusted, and say what helps."""
    if found.rough:
        warnings.warn(
            f"{found}. Thresholds: metasmoothness below {SMOOTH_ENOUGH}, amplification above {AMPLIFICATION_LIMIT:g}. Smooth "
            "activations (GELU), lower learning rates, clipping and larger batches make training smoother; "
            'Unrolled(curvature="auto") tames rough runs; lyapunov_exponents(run) says from which step on a run is.',
            RoughTraining,
            stacklevel=3,
        )


def _final(run: Trajectory) -> Tensor:
    return flatten(run.final_state.params.values()).double()
