"""Adam with a complex first factor.

    μ' = β₁ μ − g                           v' = β₂ v + (1 − β₂) g²         (Lorraine et al. 2022)
    θ' = θ + (η / n) Re(μ') / (√(v'/c₂ + ε₀) + ε)               c₂ = 1 − β₂ᵗ

    n = 1                                   normalise="none", the paper's
    n = Re(1 / (1 − β₁))                    normalise="dc"

Symbols: θ parameter · g gradient, with λθ added if there is weight_decay λ [loss/θ²] · μ "first_moment_real" +
i "first_moment_imaginary" [loss/θ] · v "second_moment" [loss²/θ²] · η learning_rate [θ] · β₁ = beta1 · e^{i beta1_argument},
|β₁| < 1 · β₂ beta2 · ε epsilon [loss/θ] · ε₀ epsilon_root [loss²/θ²], see ``adam.py`` · t step, counted from 1.

μ is a sum, without Adam's 1 − β₁ and without a correction of its first steps. So with n = 1 a constant gradient moves θ by
η Re(1 / (1 − β₁)) a step in the end: 2.2 η for 0.8 e^{iπ/8}, 10 η for 0.9. With "dc" (the gain at frequency 0) it moves by η as
in Adam, and a learning rate of Adam's can be taken over; for real β₁ that is Adam without the first correction.

As a real beta1 may be negative, β₁ = 0 is RMSprop with a corrected v. Long-run step size, v' frozen:
s = η Re(1 / (1 − β₁)) / n / (√(v'/c₂ + ε₀) + ε). Derivatives at v = 0: see ``adam.py``.

Assumes that coordinates are alike in their turning: dividing by √v' makes the game another one, and no theorem carries over.

Cost: elementwise, three slots. Reference: Lorraine, Acuna, Vicol & Duvenaud, "Complex momentum for optimization in games",
AISTATS 2022, arXiv:2102.08431.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrograd.errors import InputError
from retrograd.update_rules.adam import adaptive_hyper, denominator
from retrograd.update_rules.arithmetic import Number, add_product, add_quotient, decay
from retrograd.update_rules.complex_momentum import cartesian, gain, turned_velocity
from retrograd.update_rules.rule import Hyper

SLOTS = {
    "first_moment_real": "exp_avg_real",
    "first_moment_imaginary": "exp_avg_imaginary",
    "second_moment": "exp_avg_sq",
}
NORMALISATIONS = ("none", "dc")


def divisor(normalise: str, factor: tuple[Number, Number]) -> Number:
    """Return n, for β₁ given by its parts."""
    return gain((1.0, 0.0), factor) if normalise == "dc" else 1.0


@dataclass(frozen=True)
class ComplexAdam:
    """Adam with a complex first factor; its weight decay is part of the gradient.

    Args:
        normalise: "none", as in the paper, or "dc": a constant gradient is to give the step of Adam.
        maximize: Whether the objective is to grow.

    Raises:
        InputError: ``normalise`` is neither.

    The first step is η whatever the gradient's size.

    >>> import torch
    >>> hyper = {"learning_rate": 0.1, "beta1": 0.8, "beta1_argument": 0.4, "beta2": 0.99, "epsilon": 0.0, "step": 1.0}
    >>> zeros = {name: torch.zeros(2) for name in ComplexAdam().slots}
    >>> ComplexAdam().apply(torch.ones(2), zeros, torch.tensor([3.0, -0.5]), hyper)[0]
    tensor([0.9000, 1.1000])
    """

    normalise: str = "none"
    maximize: bool = False

    torch_slots = SLOTS

    def __post_init__(self):
        if self.normalise not in NORMALISATIONS:
            raise InputError(f"normalise must be one of {NORMALISATIONS}, got {self.normalise!r}.")

    @property
    def slots(self) -> tuple[str, ...]:
        """The two parts of the first moment, and the second moment."""
        return tuple(SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', {μ', v'}) by the equations above.

        Args:
            parameter: θ.
            slots: "first_moment_real", "first_moment_imaginary" and "second_moment".
            gradient: g.
            hyper: learning_rate, beta1, beta2, epsilon, step; optional beta1_argument, epsilon_root, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        gradient = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        factor = _factor(hyper)
        real, imaginary = turned_velocity(slots["first_moment_real"], slots["first_moment_imaginary"], gradient, factor)
        second = add_product(slots["second_moment"] * hyper["beta2"], gradient, gradient, 1 - hyper["beta2"])
        rate = hyper["learning_rate"] / divisor(self.normalise, factor)
        parameter = add_quotient(parameter, real, denominator(second, hyper), rate)
        return parameter, {"first_moment_real": real, "first_moment_imaginary": imaginary, "second_moment": second}

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = η Re(1 / (1 − β₁)) / n / (√(v'/c₂ + ε₀) + ε).

        Args:
            slots: Those after the step.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], shaped like the parameter, negative if ``maximize``.
        """
        factor = _factor(hyper)
        total = hyper["learning_rate"] * gain((1.0, 0.0), factor) / divisor(self.normalise, factor)
        return (-total if self.maximize else total) / denominator(slots["second_moment"], hyper)

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.ComplexAdam``.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            learning_rate, beta1, beta1_argument, beta2, epsilon, epsilon_root, weight_decay, step.
        """
        return {**adaptive_hyper(group, state), "beta1_argument": float(group["beta1_argument"])}


def _factor(hyper: Hyper) -> tuple[Number, Number]:
    return cartesian(hyper["beta1"], hyper.get("beta1_argument", 0.0))
