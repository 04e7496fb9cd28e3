"""RMSprop: gradients divided by the root of their running mean square, with momentum after the division.

    v' = α v + (1 − α) g²          a' = a + (1 − α)(g − a)          D = √(v' − a'²) + ε  (centered), √v' + ε  (not)
    b' = μ b + g/D                 θ' = θ − η b'                    (Tieleman & Hinton 2012; Graves 2013, eqs. 38–41)

Symbols: θ parameter · g gradient [loss/θ], with λθ added if there is weight_decay λ [loss/θ²] · v "mean_square" [loss²/θ²] ·
a "mean_gradient" [loss/θ], centered only · b "velocity" [1], with momentum only · η learning_rate [θ] · α smoothing (torch:
alpha) · ε epsilon [loss/θ] · μ momentum. Without momentum b' is g/D. There is no correction of the initial bias.
ε is outside of the root as in torch; Graves has it inside.

Long-run step size: the pulse g = 1 moves b by 1/D and later by μᵏ/D, so that s = η/(D(1 − μ)), with D frozen.

Assumes 0 ≤ μ < 1 for s. At v = 0 the exact ∂θ'/∂g is the spike η/ε, which holds only for |g| ≪ ε (see ``adam.py``). Centered,
rounding can make v' − a'² negative and the root NaN, here as in torch.

Equals ``torch.optim.RMSprop`` on CPU bit for bit (hyperparameters floats).

Cost: elementwise, one to three slots. References: Tieleman & Hinton, "Lecture 6.5: rmsprop", Coursera 2012; Graves,
"Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013 (centered).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.update_rules.arithmetic import (
    add_product,
    add_quotient,
    add_scaled,
    decay,
    interpolate,
    is_zero,
    sqrt_flat_at_zero,
)
from retrograd.update_rules.rule import Hyper
from retrograd.update_rules.sgd import momentum_factor
from retrograd.update_rules.torch_options import DIFFERENTIABLE, agreed_option, any_nonzero, check_options

SLOTS = {
    "mean_square": "square_avg",
    "mean_gradient": "grad_avg",
    "velocity": "momentum_buffer",
}


@dataclass(frozen=True)
class RMSprop:
    """RMSprop, plain or centered, with or without momentum.

    Args:
        momentum: Whether parameters have a velocity. Its factor is ``hyper["momentum"]``.
        centered: Whether the squared mean of the gradient is subtracted from its mean square: a variance.
        maximize: Whether the objective is to grow.

    The first step is η/√(1 − α) = 2η whatever the gradient's size.

    >>> hyper = {"learning_rate": 0.1, "smoothing": 0.75, "epsilon": 0.0}
    >>> RMSprop().apply(torch.ones(2), {"mean_square": torch.zeros(2)}, torch.tensor([3.0, -0.5]), hyper)[0]
    tensor([0.8000, 1.2000])
    """

    momentum: bool = False
    centered: bool = False
    maximize: bool = False

    torch_optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.RMSprop
    torch_slots = SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The mean square, and what centering and momentum need."""
        return ("mean_square",) + ("mean_gradient",) * self.centered + ("velocity",) * self.momentum

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return θ' and the slots after the step by the equations above.

        Args:
            parameter: θ.
            slots: "mean_square" v; "mean_gradient" a if centered; "velocity" b if there is momentum.
            gradient: g.
            hyper: learning_rate, smoothing, epsilon; optional momentum, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        momentum = momentum_factor(self, hyper)
        gradient = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        new = dict(slots)
        new["mean_square"] = add_product(slots["mean_square"] * hyper["smoothing"], gradient, gradient, 1 - hyper["smoothing"])
        if self.centered:
            new["mean_gradient"] = interpolate(slots["mean_gradient"], gradient, 1 - hyper["smoothing"])
        scale = self._denominator(new, hyper)
        if is_zero(momentum):
            # Not the formula below at momentum 0: here torch divides and subtracts in one kernel, which rounds differently.
            return add_quotient(parameter, gradient, scale, -hyper["learning_rate"]), new
        new["velocity"] = add_quotient(slots["velocity"] * momentum, gradient, scale, 1.0)
        return add_scaled(parameter, new["velocity"], -hyper["learning_rate"]), new

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = η/(D(1 − μ)).

        Args:
            slots: Those after the step.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], shaped like the parameter, negative if ``maximize``.
        """
        learning_rate = -hyper["learning_rate"] if self.maximize else hyper["learning_rate"]
        return learning_rate / (1 - momentum_factor(self, hyper)) / self._denominator(slots, hyper)

    def _denominator(self, slots: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D of the slots after a step."""
        square = slots["mean_square"]
        if self.centered:
            square = add_product(square, slots["mean_gradient"], slots["mean_gradient"], -1.0)
        return sqrt_flat_at_zero(square) + hyper["epsilon"]

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, /) -> "RMSprop":
        """Return the rule of a ``torch.optim.RMSprop``.

        Args:
            optimizer: The optimizer. Groups with and without momentum may be mixed.

        Returns:
            The rule.
        """
        check_options(optimizer, DIFFERENTIABLE)
        return cls(
            momentum=any_nonzero(optimizer, "momentum"),
            centered=agreed_option(optimizer, "centered"),
            maximize=agreed_option(optimizer, "maximize"),
        )

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step.

        Args:
            group: The parameter group.
            state: Not used: no hyperparameter depends on it.

        Returns:
            learning_rate, smoothing, epsilon, momentum, weight_decay.
        """
        return {
            "learning_rate": float(group["lr"]),
            "smoothing": float(group["alpha"]),
            "epsilon": float(group["eps"]),
            "momentum": float(group["momentum"]),
            "weight_decay": float(group["weight_decay"]),
        }
