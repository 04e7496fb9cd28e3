"""What a stretch of training does along a direction of curvature σ: how much of a displacement it keeps, what a force puts in.

    kept(σ) = exp(−cσ),     put_in(σ) = (1 − exp(−cσ)) / σ          many small steps, c = Σ η with momentum summed up
    kept(σ) = (M^K)_00,     put_in(σ) = −(M^K)_02                    K heavy-ball steps from rest

with M = [[1 − ησ, −ημ, −η], [σ, μ, 1], [0, 0, 1]] acting on (displacement, velocity, force). Both are functions of σ alone,
so that a curvature operator can apply them, and kept = 1 − σ · put_in.

Reference: Bae, Lin, Lorraine, Grosse (2024), "Training data attribution via approximate unrolled differentiation", equations 13
to 15 and appendix D.2 for the first; the second is ours.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Flow(Protocol):
    """A stretch of training in one direction of curvature."""

    def put_in(self, curvature: Tensor, /) -> Tensor:
        """How far a constant force of 1 has moved at the end."""
        ...

    def kept(self, curvature: Tensor, /) -> Tensor:
        """What is left at the end of a displacement of 1."""
        ...


@dataclass(frozen=True)
class Exponential:
    """Many small steps: c = Σ η, momentum summed up."""

    duration: float

    def put_in(self, curvature: Tensor) -> Tensor:
        """(1 − exp(−cσ)) / σ."""
        curved = self.duration * curvature
        return self.duration * torch.where(curved == 0, 1.0, -torch.expm1(-curved) / torch.where(curved == 0, 1.0, curved))

    def kept(self, curvature: Tensor) -> Tensor:
        """exp(−cσ)."""
        return torch.exp(-self.duration * curvature)


@dataclass(frozen=True)
class HeavyBall:
    """K steps of SGD with momentum μ at a constant learning rate, from rest.

    Curvature past the edge of stability, ησ > 2 (1 + μ), is taken to be at the edge: the real run did not diverge.
    """

    steps: int
    rate: float
    momentum: float

    def put_in(self, curvature: Tensor) -> Tensor:
        """What a force of 1 at every step has moved after K steps."""
        return -self._after(curvature)[..., 0, 2]

    def kept(self, curvature: Tensor) -> Tensor:
        """What is left of a displacement of 1 after K steps."""
        return self._after(curvature)[..., 0, 0].clamp(-1, 1)

    def _after(self, curvature: Tensor) -> Tensor:
        """M^K of (displacement, velocity, 1), with the force as a third column."""
        curvature = curvature.clamp(max=2 * (1 + self.momentum) / self.rate)
        one, rate = torch.ones_like(curvature), self.rate
        rows = [
            [1 - rate * curvature, -rate * self.momentum * one, -rate * one],
            [curvature, self.momentum * one, one],
            [0 * one, 0 * one, one],
        ]
        step = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        return torch.linalg.matrix_power(step, self.steps)
