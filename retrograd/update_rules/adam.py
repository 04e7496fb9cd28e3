"""Adam: gradients divided by the root of their mean square.

    m' = m + (1 − β₁)(g − m)            v' = β₂ v + (1 − β₂) g²             (Kingma & Ba 2015, algorithm 1)
    θ' = θ − η (m'/c₁) / (√(v'/c₂ + ε₀) + ε)            c₁ = 1 − β₁ᵗ, c₂ = 1 − β₂ᵗ

Symbols: θ parameter · g gradient [loss/θ], with λθ added if there is weight_decay λ [loss/θ²] · m "first_moment" [loss/θ] ·
v "second_moment" [loss²/θ²] · η learning_rate [θ] · β₁ beta1, β₂ beta2 · ε epsilon [loss/θ] · ε₀ epsilon_root [loss²/θ²] ·
t step, counted from 1.

ε₀ is not in the paper nor in torch, where it is 0. It makes the step smooth in g near g = v = 0 and with it the whole run
differentiable in a useful way (Engstrom et al. 2025, "metasmoothness").

Long-run step size: Σₖ (1 − β₁)β₁ᵏ = 1 and c₁ → 1, so that s = η / (√(v'/c₂ + ε₀) + ε), with v' frozen.

Where derivatives say little: at v = 0 (dead unit, unused embedding row) the exact ∂θ'/∂g is the spike η(1 − β₁)/(c₁ ε), which
holds only for |g| ≪ ε; with ε = 0 it is 0/0. At t = 1 the step is η·sign(g), and its derivative 0 but for that spike. Both
heal with ε₀ > 0. The derivative of √ at 0: see ``arithmetic.sqrt_flat_at_zero``.

Equals ``torch.optim.Adam`` on CPU bit for bit (ε₀ = 0, hyperparameters floats); torch's foreach, fused and capturable variants
up to rounding. AMSGrad is refused: it is another rule, with one more slot.

Cost: elementwise, two slots. Reference: Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.update_rules.arithmetic import add_product, add_quotient, decay, interpolate, sqrt_flat_at_zero
from retrograd.update_rules.rule import Hyper
from retrograd.update_rules.torch_options import DIFFERENTIABLE, agreed_option, check_options

SLOTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
UNSUPPORTED = {"amsgrad": (False, "AMSGrad is another rule."), **DIFFERENTIABLE}


def adaptive_step(
    parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (θ', {m', v'}) by the equations above; what Adam and AdamW share."""
    first = interpolate(slots["first_moment"], gradient, 1 - hyper["beta1"])
    second = add_product(slots["second_moment"] * hyper["beta2"], gradient, gradient, 1 - hyper["beta2"])
    correction = 1 - hyper["beta1"] ** hyper["step"]
    parameter = add_quotient(parameter, first, denominator(second, hyper), -(hyper["learning_rate"] / correction))
    return parameter, {"first_moment": first, "second_moment": second}


def denominator(second_moment: Tensor, hyper: Hyper) -> Tensor:
    """Return √(v/c₂ + ε₀) + ε, as √(v + c₂ε₀)/√c₂ + ε to round like torch."""
    correction = 1 - hyper["beta2"] ** hyper["step"]
    root = sqrt_flat_at_zero(second_moment + correction * hyper.get("epsilon_root", 0.0))
    return root / correction**0.5 + hyper["epsilon"]


def adaptive_hyper(group: dict[str, Any], state: dict[str, Any]) -> dict[str, float]:
    """Return the hyperparameters of the coming step of a torch Adam or AdamW."""
    beta1, beta2 = group["betas"]
    return {
        "learning_rate": float(group["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "epsilon": float(group["eps"]),
        "epsilon_root": 0.0,
        "weight_decay": float(group["weight_decay"]),
        "step": float(state.get("step", 0)) + 1,
    }


@dataclass(frozen=True)
class Adam:
    """Adam; its weight decay is part of the gradient.

    Args:
        maximize: Whether the objective is to grow.

    The first step is η whatever the gradient's size.

    >>> hyper = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.999, "epsilon": 0.0, "step": 1.0}
    >>> zeros = {"first_moment": torch.zeros(2), "second_moment": torch.zeros(2)}
    >>> Adam().apply(torch.ones(2), zeros, torch.tensor([3.0, -0.5]), hyper)[0]
    tensor([0.9000, 1.1000])
    """

    maximize: bool = False

    torch_optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    torch_slots = SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The first and the second moment."""
        return tuple(SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', {m', v'}) by the equations above.

        Args:
            parameter: θ.
            slots: "first_moment" m and "second_moment" v.
            gradient: g.
            hyper: learning_rate, beta1, beta2, epsilon, step; optional epsilon_root, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        gradient = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        return adaptive_step(parameter, slots, gradient, hyper)

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
    def from_torch(cls, optimizer: torch.optim.Optimizer, /) -> "Adam":
        """Return the rule of a ``torch.optim.Adam``.

        Args:
            optimizer: The optimizer.

        Returns:
            The rule.
        """
        advice = "torch.optim.AdamW takes the same steps."
        check_options(optimizer, {**UNSUPPORTED, "decoupled_weight_decay": (False, advice)})
        return cls(maximize=agreed_option(optimizer, "maximize"))

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            learning_rate, beta1, beta2, epsilon, epsilon_root, weight_decay, step.
        """
        return adaptive_hyper(group, state)
