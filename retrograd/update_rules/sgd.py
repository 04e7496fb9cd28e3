"""Stochastic gradient descent with momentum.

    b' = μ b + (1 − d)(g + λ θ)         θ' = θ − η b'                       heavy ball (Polyak 1964)
                                        θ' = θ − η (g + λ θ + μ b')         Nesterov (Sutskever et al. 2013, eqs. 3–4)

Symbols: θ parameter · g gradient [loss/θ] · b "velocity" [loss/θ] · η learning_rate [θ²/loss] · μ momentum · d dampening ·
λ weight_decay [loss/θ²]. Without momentum b' is g + λθ and there is no slot.

This is torch's form, where the velocity is a sum of gradients and η is outside of it; in both papers η is inside. They agree
while η is constant. Nesterov's form is that of Sutskever et al. after a change of variables to the look-ahead point.

Long-run step size: the pulse g = 1 moves b by 1 − d and later by (1 − d)μᵏ, so Σₖ gives s = η(1 − d)/(1 − μ), and
s = η(1 + μ(1 − d)/(1 − μ)) with Nesterov: both η/(1 − μ) at d = 0.

Assumes 0 ≤ μ < 1 for s. Where it differs from the textbook:

* torch starts b at the first gradient, undampened. From b = 0 that is one step with d = 0, so ``hyper_from_torch`` gives
  dampening 0 in a parameter's first step, and ``apply`` needs no case for it.
* In a group with μ exactly 0 torch keeps no velocity, and neither do we: ∂/∂μ says nothing there. Train with a tiny μ instead.

Equals ``torch.optim.SGD`` on CPU bit for bit, but for the sign of zeros: where the first gradient is −0.0 torch's b starts at
−0.0, whereas here 0 + (−0.0) = 0.

Cost: elementwise, one slot. References: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964;
Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.update_rules.arithmetic import Number, add_scaled, decay, is_zero
from retrograd.update_rules.rule import Hyper, UpdateRule
from retrograd.update_rules.torch_options import DIFFERENTIABLE, agreed_option, any_nonzero, check_options

SLOTS = {"velocity": "momentum_buffer"}


def momentum_factor(rule: UpdateRule, hyper: Hyper) -> Number:
    """Return μ, which is 0 for a rule without a velocity, and raise ``InputError`` if that contradicts ``hyper``."""
    momentum = hyper.get("momentum", 0.0)
    if "velocity" in rule.slots:
        return momentum
    if not isinstance(momentum, Tensor) and momentum != 0:
        name = type(rule).__name__
        raise InputError(f"{rule} was given momentum {momentum}, but has no velocity. Use {name}(momentum=True).")
    return 0.0


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, plain, with heavy-ball or with Nesterov momentum.

    Args:
        momentum: Whether parameters have a velocity. Its factor is ``hyper["momentum"]``.
        nesterov: Whether the gradient is taken to be that at the look-ahead point.
        maximize: Whether the objective is to grow.

    Raises:
        InputError: ``nesterov`` without ``momentum``.

    A gradient of 2, then none: η(1 + μ) of it has been used after two steps.

    >>> rule, hyper = SGD(momentum=True), {"learning_rate": 0.1, "momentum": 0.5}
    >>> theta, slots = torch.tensor(1.0), {"velocity": torch.tensor(0.0)}
    >>> for gradient in (2.0, 0.0):
    ...     theta, slots = rule.apply(theta, slots, torch.tensor(gradient), hyper)
    >>> theta, 1 - 0.1 * (1 + 0.5) * 2
    (tensor(0.7000), 0.7)
    """

    momentum: bool = False
    nesterov: bool = False
    maximize: bool = False

    linear: ClassVar[bool] = True
    """Whether (θ', o') is linear in (θ, o, g), with the same coefficients for every coordinate."""

    torch_optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD
    torch_slots = SLOTS

    def __post_init__(self):
        if self.nesterov and not self.momentum:
            raise InputError("SGD(nesterov=True) has no momentum to look ahead with. Use SGD(momentum=True, nesterov=True).")

    @property
    def slots(self) -> tuple[str, ...]:
        """The velocity, if there is momentum."""
        return ("velocity",) if self.momentum else ()

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', b') by the equations above.

        Args:
            parameter: θ.
            slots: "velocity" b, if there is momentum.
            gradient: g.
            hyper: learning_rate; optional momentum, dampening, weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        momentum = momentum_factor(self, hyper)
        direction = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        if not is_zero(momentum):
            velocity = add_scaled(slots["velocity"] * momentum, direction, 1 - hyper.get("dampening", 0.0))
            direction = add_scaled(direction, velocity, momentum) if self.nesterov else velocity
            slots = {"velocity": velocity}
        return add_scaled(parameter, direction, -hyper["learning_rate"]), dict(slots)

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = η(1 − d)/(1 − μ), or Nesterov's; the same for each coordinate.

        Args:
            slots: Not used.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], negative if ``maximize``.

        >>> SGD(momentum=True).step_size({}, {"learning_rate": 0.1, "momentum": 0.5})
        0.2
        """
        momentum = momentum_factor(self, hyper)
        learning_rate = -hyper["learning_rate"] if self.maximize else hyper["learning_rate"]
        if is_zero(momentum):
            return learning_rate
        passed_on = (1 - hyper.get("dampening", 0.0)) / (1 - momentum)
        return learning_rate * (1 + momentum * passed_on if self.nesterov else passed_on)

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, /) -> "SGD":
        """Return the rule of a ``torch.optim.SGD``.

        Args:
            optimizer: The optimizer. Groups with and without momentum may be mixed.

        Returns:
            The rule.
        """
        check_options(optimizer, DIFFERENTIABLE)
        return cls(
            momentum=any_nonzero(optimizer, "momentum"),
            nesterov=agreed_option(optimizer, "nesterov", where="momentum"),
            maximize=agreed_option(optimizer, "maximize"),
        )

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            learning_rate, momentum, dampening (0 while torch has no velocity yet), weight_decay.
        """
        in_use = group["momentum"] != 0
        return {
            "learning_rate": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]) if in_use and state.get("momentum_buffer") is not None else 0.0,
            "weight_decay": float(group["weight_decay"]),
        }
