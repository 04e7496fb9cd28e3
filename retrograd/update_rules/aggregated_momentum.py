"""Aggregated momentum: several velocities, each with its own damping, and a step along their mean.

    v_k' = β_k v_k − g                      k = 0 … K − 1                   (Lucas et al. 2019)
    θ'   = θ + (η / K) Σ_k v_k'

Symbols: θ parameter · g gradient, with λθ added if there is weight_decay λ [loss/θ²] · v_k "velocity_k" [loss/θ] ·
β_k dampings, |β_k| < 1 · η learning_rate [θ²/loss].

Slow velocities make speed, fast ones keep it from oscillating: a mode that one damping would make swing is damped by the mean.
The paper takes β_k = 1 − 0.1ᵏ, which starts with the plain gradient. ``dampings=(β,)`` is SGD with plain momentum, the velocity
having the other sign, and here β may be negative. Two conjugate dampings are complex momentum with a real learning rate: see
``complex_momentum.py``, which has the real form of it.

Dampings decide how many slots there are; so they are options, shared by all groups, and not numbers to differentiate by.

Long-run step size: each velocity passes on 1 / (1 − β_k) of a gradient in the end, so s = (η / K) Σ_k 1 / (1 − β_k).

Cost: elementwise, K slots. Reference: Lucas, Sun, Zemel & Grosse, "Aggregated momentum: stability through passive damping",
ICLR 2019.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retrograd.errors import InputError
from retrograd.update_rules.arithmetic import add_scaled, decay
from retrograd.update_rules.rule import Hyper


@dataclass(frozen=True)
class AggregatedMomentum:
    """Gradient descent with aggregated momentum.

    Args:
        dampings: β_k, one for each velocity; real, between −1 and 1.
        maximize: Whether the objective is to grow.

    Raises:
        InputError: There is no damping, or one is not between −1 and 1.

    A gradient of 1, then none: the mean of 1 and 1, then of 0 and 1/2.

    >>> import torch
    >>> rule, theta = AggregatedMomentum((0.0, 0.5)), torch.tensor(0.0)
    >>> slots = {name: torch.tensor(0.0) for name in rule.slots}
    >>> for gradient in (1.0, 0.0):
    ...     theta, slots = rule.apply(theta, slots, torch.tensor(gradient), {"learning_rate": 0.1})
    >>> round(theta.item(), 6), -0.1 * (1 + 0.25)
    (-0.125, -0.125)
    """

    dampings: tuple[float, ...] = (0.0, 0.9, 0.99)
    maximize: bool = False

    linear: ClassVar[bool] = True
    """Whether (θ', o') is linear in (θ, o, g), with the same coefficients for every coordinate."""

    def __post_init__(self):
        check_dampings(self.dampings)
        object.__setattr__(self, "dampings", tuple(float(damping) for damping in self.dampings))

    @property
    def slots(self) -> tuple[str, ...]:
        """The velocities, "velocity_0" to "velocity_{K−1}"."""
        return tuple(f"velocity_{index}" for index in range(len(self.dampings)))

    @property
    def torch_slots(self) -> dict[str, str]:
        """The slots have the same names in ``optimizer.state[parameter]``."""
        return {name: name for name in self.slots}

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', v') by the equations above.

        Args:
            parameter: θ.
            slots: "velocity_0" … "velocity_{K−1}".
            gradient: g.
            hyper: learning_rate; optional weight_decay.

        Returns:
            θ' and the slots after the step.
        """
        direction = decay(-gradient if self.maximize else gradient, parameter, hyper.get("weight_decay", 0.0))
        share, new = hyper["learning_rate"] / len(self.dampings), {}
        for name, damping in zip(self.slots, self.dampings, strict=True):
            new[name] = add_scaled(slots[name] * damping, direction, -1.0)
            parameter = add_scaled(parameter, new[name], share)
        return parameter, new

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = (η / K) Σ_k 1 / (1 − β_k); the same for each coordinate.

        Args:
            slots: Not used.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], negative if ``maximize``.

        >>> AggregatedMomentum((0.0, 0.5)).step_size({}, {"learning_rate": 0.5})
        0.75
        """
        learning_rate = -hyper["learning_rate"] if self.maximize else hyper["learning_rate"]
        return learning_rate * (sum(1 / (1 - damping) for damping in self.dampings) / len(self.dampings))

    @classmethod
    def hyper_from_torch(cls, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.AggregatedSGD``.

        Args:
            group: The parameter group.
            state: Not used.

        Returns:
            learning_rate, weight_decay.
        """
        return {"learning_rate": float(group["lr"]), "weight_decay": float(group["weight_decay"])}


def check_dampings(dampings: Any) -> None:
    """Raise ``InputError`` unless these are one or more real numbers between −1 and 1."""
    if not isinstance(dampings, list | tuple) or not dampings:
        raise InputError(f"dampings must be one or more numbers, such as (0.0, 0.9, 0.99), got {dampings!r}.")
    if not all(isinstance(damping, int | float) and -1 < damping < 1 for damping in dampings):
        raise InputError(
            f"dampings must be real and between -1 and 1, got {dampings}. A conjugate pair is complex momentum: ComplexSGD."
        )
