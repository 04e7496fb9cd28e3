"""Optimistic gradient descent, and Adam: the last change of the gradient is expected to happen once more.

    θ' = θ − η [(1 + ρ) g − ρ g₋]           g₋' = g                         (Daskalakis et al. 2018, ρ = 1)
    θ' = θ − η [(1 + ρ) d − ρ d₋]           d₋' = d, d = m̂ / (√(v̂ + ε₀) + ε)     OptimisticAdam, their algorithm 1

Symbols: θ parameter · g gradient, with λθ added if there is weight_decay λ [loss/θ²] · g₋ "previous_gradient" [loss/θ] · d the
direction of Adam, d₋ "previous_direction" [1] · m, v "first_moment", "second_moment", as in ``adam.py`` · η learning_rate
[θ²/loss; θ for Adam] · ρ optimism.

In the form θ' = θ − (a + b) g + b g₋ that is a = η and b = ρη: a schedule on η moves both, and their ratio stays. With ρ = 0
this is gradient descent (Adam).

It is extragradient with the old gradient in the place of the extrapolation: one gradient a step instead of two, and like it
stable near equilibria with imaginary eigenvalues, for small η. In practice gradients are those of different mini-batches, and
then ρ adds noise: the variance of the step is (1 + ρ)² + ρ² times that of a plain one, less if batches are alike.

In a parameter's first step there is no g₋, and it is taken to be g: a plain step. ``has_previous`` in h is 0 in that step and 1
in all others, which keeps ∂/∂ρ of the first step at 0, as it is in truth; so ``apply`` needs no case for it.

Long-run step size: what is taken ρ times too much in one step is given back in the next, so s = η; for Adam with v' frozen
s = η / (√(v'/c₂ + ε₀) + ε), as without optimism.

Cost: elementwise; one slot, for Adam three. References: Daskalakis, Ilyas, Syrgkanis & Zeng, "Training GANs with optimism",
ICLR 2018; Popov, "A modification of the Arrow-Hurwicz method for search of saddle points", 1980.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retrograd.update_rules.adam import SLOTS as ADAM_SLOTS
from retrograd.update_rules.adam import adaptive_hyper, denominator
from retrograd.update_rules.arithmetic import add_product, add_scaled, decay, interpolate, is_zero
from retrograd.update_rules.rule import Hyper

GRADIENT_SLOTS = {"previous_gradient": "previous_gradient"}
DIRECTION_SLOTS = {**ADAM_SLOTS, "previous_direction": "previous_direction"}


def optimistic_step(parameter: Tensor, direction: Tensor, previous: Tensor, hyper: Hyper) -> Tensor:
    """Return θ − η [(1 + ρ) direction − ρ previous]."""
    optimism = hyper.get("optimism", 1.0) * hyper.get("has_previous", 1.0)
    parameter = add_scaled(parameter, direction, -(hyper["learning_rate"] * (1 + optimism)))
    return parameter if is_zero(optimism) else add_scaled(parameter, previous, hyper["learning_rate"] * optimism)


@dataclass(frozen=True)
class OptimisticGradient:
    """Optimistic gradient descent.

    Args:
        maximize: Whether the objective is to grow.

    On x y, with x to fall and y to rise from (1, 1), gradient descent leaves on a spiral; this one comes in, by a factor of
    √½ a step if η = ½.

    >>> import torch
    >>> rule, point, hyper = OptimisticGradient(), torch.ones(2), {"learning_rate": 0.5, "optimism": 1.0}
    >>> slots = {"previous_gradient": torch.tensor([1.0, -1.0])}
    >>> for _ in range(60):
    ...     point, slots = rule.apply(point, slots, torch.stack([point[1], -point[0]]), hyper)
    >>> bool(point.norm() < 1e-6)
    True
    """

    maximize: bool = False

    linear: ClassVar[bool] = True
    """Whether (θ', o') is linear in (θ, o, g), with the same coefficients for every coordinate."""

    torch_slots = GRADIENT_SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The gradient of the last step, weight decay included."""
        return tuple(GRADIENT_SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', g₋') by the equations above.

        Args:
            parameter: θ.
            slots: "previous_gradient" g₋.
            gradient: g.
            hyper: learning_rate; optional optimism (1 if not given), has_previous (0 in the first step), weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        direction = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        # A copy: what a rule returns is nobody's gradient.
        kept = direction.clone() if direction is gradient else direction
        return optimistic_step(parameter, direction, slots["previous_gradient"], hyper), {"previous_gradient": kept}

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = η; the same for each coordinate.

        Args:
            slots: Not used.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], negative if ``maximize``.

        >>> OptimisticGradient().step_size({}, {"learning_rate": 0.1, "optimism": 1.0})
        0.1
        """
        return -hyper["learning_rate"] if self.maximize else hyper["learning_rate"]

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.OptimisticSGD``.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            learning_rate, optimism, has_previous (0 while there is no previous gradient), weight_decay.
        """
        return {
            "learning_rate": float(group["lr"]),
            "optimism": float(group["optimism"]),
            "has_previous": float(state.get("previous_gradient") is not None),
            "weight_decay": float(group["weight_decay"]),
        }


@dataclass(frozen=True)
class OptimisticAdam:
    """Optimistic Adam; its weight decay is part of the gradient.

    Args:
        maximize: Whether the objective is to grow.

    The first step is η whatever the gradient's size, and so is the second if the gradient stays.

    >>> import torch
    >>> hyper = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 0.0, "optimism": 1.0}
    >>> theta, slots = torch.ones(2), {name: torch.zeros(2) for name in OptimisticAdam().slots}
    >>> for step in (1.0, 2.0):
    ...     now = {**hyper, "step": step, "has_previous": float(step > 1)}
    ...     theta, slots = OptimisticAdam().apply(theta, slots, torch.tensor([3.0, -0.5]), now)
    >>> theta
    tensor([0.8000, 1.2000])
    """

    maximize: bool = False

    torch_slots = DIRECTION_SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The first and the second moment, and the direction of the last step."""
        return tuple(DIRECTION_SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', {m', v', d₋'}) by the equations above.

        Args:
            parameter: θ.
            slots: "first_moment" m, "second_moment" v and "previous_direction" d₋.
            gradient: g.
            hyper: learning_rate, beta1, beta2, epsilon, step; optional optimism (1 if not given), has_previous (0 in the first
                step), epsilon_root, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        gradient = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        first = interpolate(slots["first_moment"], gradient, 1 - hyper["beta1"])
        second = add_product(slots["second_moment"] * hyper["beta2"], gradient, gradient, 1 - hyper["beta2"])
        direction = first / (1 - hyper["beta1"] ** hyper["step"]) / denominator(second, hyper)
        parameter = optimistic_step(parameter, direction, slots["previous_direction"], hyper)
        return parameter, {"first_moment": first, "second_moment": second, "previous_direction": direction}

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = η / (√(v'/c₂ + ε₀) + ε).

        Args:
            slots: Those after the step.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], shaped like the parameter, negative if ``maximize``.
        """
        learning_rate = -hyper["learning_rate"] if self.maximize else hyper["learning_rate"]
        return learning_rate / denominator(slots["second_moment"], hyper)

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.OptimisticAdam``.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            learning_rate, beta1, beta2, epsilon, epsilon_root, weight_decay, step, optimism, has_previous.
        """
        known = float(state.get("previous_direction") is not None)
        return {**adaptive_hyper(group, state), "optimism": float(group["optimism"]), "has_previous": known}
