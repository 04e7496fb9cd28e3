"""Momentum with a complex factor: a velocity that turns while it decays.

    μ' = β μ − g            μ complex, from 0                               (Lorraine et al. 2022, simultaneous update)
    θ' = θ + Re(α μ')

Symbols: θ parameter · g gradient, with λθ added if there is weight_decay λ [loss/θ²] · μ "velocity_real" +
i "velocity_imaginary" [loss/θ] · α = learning_rate · e^{i learning_rate_argument} [θ²/loss] · β = momentum · e^{i
momentum_argument}, |β| < 1 · arguments in radians, 0 if not given.

In real numbers, which is how it is computed (a complex tensor has no half-precision form, and g is real anyway):

    Re μ' = Re β Re μ − Im β Im μ − g      Im μ' = Im β Re μ + Re β Im μ      θ' = θ + Re α Re μ' − Im α Im μ'

A learning rate is |α|, so that a schedule scales the step and leaves its direction. ``momentum`` may be negative: real β of
either sign is written with argument 0, where everything imaginary vanishes exactly and this is SGD with plain momentum, bit
for bit, the velocity having the other sign. ``torch.optim.SGD`` refuses the negative ones, which help in games where the
players take turns (Gidel et al. 2019).

Why complex: near an equilibrium of a game the Jacobian of the gradients has complex eigenvalues, the iterates turn, and no
real factor, positive or negative, is stable for players that move at once where the eigenvalues are purely imaginary. Complex
factors are, for small α exactly if (Im β)² > (1 − Re β)² (1 + Re β) / (3 − Re β) (own derivation, real α). Where eigenvalues
are real it acts as ordinary momentum does. With real α, Re(α μ) is the mean of the two conjugate velocities: aggregated
momentum with dampings β and β̄.

Long-run step size: the pulse g = 1 moves μ by −1 and later by −βᵏ, so s = Σₖ Re(α βᵏ) = Re(α / (1 − β)). It is not negative
for real α, and can be for complex α.

Assumes |β| < 1 for s. Cost: elementwise, two real slots.

References: Lorraine, Acuna, Vicol & Duvenaud, "Complex momentum for optimization in games", AISTATS 2022, arXiv:2102.08431;
Gidel, Askari Hemmat, Pezeshki, Le Priol, Huang, Lacoste-Julien & Mitliagkas, "Negative momentum for improved game dynamics",
AISTATS 2019.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.update_rules.arithmetic import Number, add_scaled, decay, is_zero
from retrograd.update_rules.rule import Hyper

SLOTS = {"velocity_real": "velocity_real", "velocity_imaginary": "velocity_imaginary"}


def cartesian(modulus: Number, argument: Number) -> tuple[Number, Number]:
    """Return real and imaginary part of modulus · e^{i argument}, argument in radians.

    >>> cartesian(-0.5, 0.0)
    (-0.5, -0.0)
    """
    if isinstance(argument, Tensor):
        return modulus * torch.cos(argument), modulus * torch.sin(argument)
    return modulus * math.cos(argument), modulus * math.sin(argument)


def turned_velocity(real: Tensor, imaginary: Tensor, direction: Tensor, factor: tuple[Number, Number]) -> tuple[Tensor, Tensor]:
    """Return Re and Im of β μ − g, for β given by its parts."""
    by_real, by_imaginary = factor
    new_real, new_imaginary = real * by_real, imaginary * by_real
    if not is_zero(by_imaginary):
        new_real = add_scaled(new_real, imaginary, -by_imaginary)
        new_imaginary = add_scaled(new_imaginary, real, by_imaginary)
    return add_scaled(new_real, direction, -1.0), new_imaginary


def gain(numerator: tuple[Number, Number], factor: tuple[Number, Number]) -> Number:
    """Return Re(α / (1 − β)), for α and β given by their parts."""
    rest, turn = 1 - factor[0], factor[1]
    return (numerator[0] * rest - numerator[1] * turn) / (rest * rest + turn * turn)


@dataclass(frozen=True)
class ComplexMomentum:
    """Gradient descent with a complex momentum.

    Args:
        maximize: Whether the objective is to grow.

    A gradient of 1, then none, with β = i/2 and α = 1: Re(−1) = −1 is followed by Re(−β) = 0 and Re(−β²) = 1/4.

    >>> import math
    >>> rule, theta = ComplexMomentum(), torch.tensor(0.0)
    >>> hyper = {"learning_rate": 1.0, "momentum": 0.5, "momentum_argument": math.pi / 2}
    >>> slots = {"velocity_real": torch.tensor(0.0), "velocity_imaginary": torch.tensor(0.0)}
    >>> for gradient in (1.0, 0.0, 0.0):
    ...     theta, slots = rule.apply(theta, slots, torch.tensor(gradient), hyper)
    ...     print(round(theta.item(), 6))
    -1.0
    -1.0
    -0.75
    """

    maximize: bool = False

    linear: ClassVar[bool] = True
    """Whether (θ', o') is linear in (θ, o, g), with the same coefficients for every coordinate."""

    torch_slots = SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The two parts of the velocity."""
        return tuple(SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', μ') by the equations above.

        Args:
            parameter: θ.
            slots: "velocity_real" and "velocity_imaginary".
            gradient: g.
            hyper: learning_rate, momentum; optional learning_rate_argument, momentum_argument, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        direction = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        rate, factor = _rate_and_factor(hyper)
        real, imaginary = turned_velocity(slots["velocity_real"], slots["velocity_imaginary"], direction, factor)
        parameter = add_scaled(parameter, real, rate[0])
        if not is_zero(rate[1]):
            parameter = add_scaled(parameter, imaginary, -rate[1])
        return parameter, {"velocity_real": real, "velocity_imaginary": imaginary}

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = Re(α / (1 − β)); the same for each coordinate.

        Args:
            slots: Not used.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], with the other sign if ``maximize``.

        >>> ComplexMomentum().step_size({}, {"learning_rate": 0.1, "momentum": 0.5})
        0.2
        """
        total = gain(*_rate_and_factor(hyper))
        return -total if self.maximize else total

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.ComplexSGD``.

        Args:
            group: The parameter group.
            state: Not used.

        Returns:
            learning_rate, learning_rate_argument, momentum, momentum_argument, weight_decay.
        """
        return {
            "learning_rate": float(group["lr"]),
            "learning_rate_argument": float(group["lr_argument"]),
            "momentum": float(group["momentum"]),
            "momentum_argument": float(group["momentum_argument"]),
            "weight_decay": float(group["weight_decay"]),
        }


def _rate_and_factor(hyper: Hyper) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
    rate = cartesian(hyper["learning_rate"], hyper.get("learning_rate_argument", 0.0))
    return rate, cartesian(hyper["momentum"], hyper.get("momentum_argument", 0.0))
