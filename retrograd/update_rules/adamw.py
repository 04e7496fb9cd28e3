"""AdamW: Adam with weight decay taken out of the gradient.

    θ' = (1 − ηλ) θ − η (m'/c₁) / (√(v'/c₂ + ε₀) + ε)           (Loshchilov & Hutter 2019, algorithm 2)

Symbols, m', v', long-run step size s, failures and cost: see ``adam.py``. Here g never contains λθ, and weight_decay λ has the
unit 1/θ, as it is multiplied by η [θ] only.

As in torch, λ is multiplied by the learning rate. The paper's λ is multiplied by the schedule only: λ(paper) = η₀ λ, with η₀
the learning rate before the schedule.

Equals ``torch.optim.AdamW`` on CPU bit for bit (ε₀ = 0, hyperparameters floats).

Reference: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.update_rules.adam import SLOTS, UNSUPPORTED, adaptive_hyper, adaptive_step, denominator
from retrograd.update_rules.arithmetic import is_zero
from retrograd.update_rules.rule import Hyper
from retrograd.update_rules.torch_options import agreed_option, check_options


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Args:
        maximize: Whether the objective is to grow.

    The first step is η whatever the gradient's size, after θ was multiplied by 1 − ηλ = 0.95.

    >>> hyper = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.999, "epsilon": 0.0, "step": 1.0, "weight_decay": 0.5}
    >>> zeros = {"first_moment": torch.zeros(2), "second_moment": torch.zeros(2)}
    >>> AdamW().apply(torch.ones(2), zeros, torch.tensor([3.0, -0.5]), hyper)[0]
    tensor([0.8500, 1.0500])
    """

    maximize: bool = False

    torch_optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW
    torch_slots = SLOTS

    @property
    def slots(self) -> tuple[str, ...]:
        """The first and the second moment."""
        return tuple(SLOTS)

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', {m', v'}) by the equation above.

        Args:
            parameter: θ.
            slots: "first_moment" m and "second_moment" v.
            gradient: g.
            hyper: learning_rate, beta1, beta2, epsilon, step; optional epsilon_root, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        weight_decay = hyper.get("weight_decay", 0.0)
        if not is_zero(weight_decay):
            parameter = parameter * (1 - hyper["learning_rate"] * weight_decay)
        return adaptive_step(parameter, slots, -gradient if self.maximize else gradient, hyper)

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
    def from_torch(cls, optimizer: torch.optim.Optimizer, /) -> "AdamW":
        """Return the rule of a ``torch.optim.AdamW``.

        Args:
            optimizer: The optimizer.

        Returns:
            The rule.
        """
        advice = "Use torch.optim.Adam for decay inside of the gradient."
        check_options(optimizer, {**UNSUPPORTED, "decoupled_weight_decay": (True, advice)})
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
