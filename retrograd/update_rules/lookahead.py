"""Lookahead: k steps of some optimizer forward, then part of the way back.

    every step         (θ', o') = U(θ, o, g, h)
    every k-th step    θ' ← φ + a (θ' − φ), and φ becomes θ'                (Zhang et al. 2019, algorithm 1)

Symbols: θ parameter ("fast weights") · φ where θ was after the last synchronisation ("slow weights"), θ₀ at first · U the inner
rule with slots o · a lookahead_share, 0 < a ≤ 1 · k steps from one synchronisation to the next.

Slots start at zero and φ does not, so what is kept is the drift D = θ − φ, which does:

    D' = D + θ' − θ        and with a synchronisation    θ' ← θ' − (1 − a) D',  D' ← 0

Whether a step synchronises is a number of it, ``synchronise`` = 0 or 1: the rule itself does not count. Inner slots go on
through a synchronisation untouched, one of the paper's options.

In games the way back damps rotations: k inner steps that spiral outward by little still average inward, which is why it is
stable on bilinear games where the inner optimizer alone is not, if a is small enough for how far k steps turn (Chavdarova et
al. 2021). Both players must synchronise together for that.

Long-run step size: whatever a gradient moves is shrunk by a at the next synchronisation, once: s = a · s of the inner rule.

Cost: elementwise, one slot beside those of U. References: Zhang, Lucas, Hinton & Ba, "Lookahead optimizer: k steps forward, 1
step back", NeurIPS 2019; Chavdarova, Pagliardini, Stich, Fleuret & Jaggi, "Taming GANs with lookahead-minmax", ICLR 2021.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.update_rules.arithmetic import add_scaled, is_zero
from retrograd.update_rules.rule import Hyper, TorchRule

DRIFT, COUNT = "drift", "lookahead_step"


def steps_taken(state: dict[str, Any]) -> int:
    """Return how many steps a parameter has made, by its state; the inner optimizer's count stands in where there is no own."""
    return int(state.get(COUNT, state.get("step", 0)))


@dataclass(frozen=True)
class Lookahead:
    """Lookahead over another rule.

    Args:
        rule: U, any elementwise rule but another lookahead.

    Raises:
        InputError: ``rule`` has a slot "drift" already.

    Two steps of SGD from 0 along a gradient of −1 come to 0.2; half of the way back is 0.1.

    >>> from retrograd.update_rules import SGD
    >>> rule, theta, slots = Lookahead(SGD()), torch.tensor(0.0), {"drift": torch.tensor(0.0)}
    >>> for synchronise in (0.0, 1.0):
    ...     hyper = {"learning_rate": 0.1, "lookahead_share": 0.5, "synchronise": synchronise}
    ...     theta, slots = rule.apply(theta, slots, torch.tensor(-1.0), hyper)
    ...     print(round(theta.item(), 6), round(slots["drift"].item(), 6))
    0.1 0.1
    0.1 0.0
    """

    rule: TorchRule

    def __post_init__(self):
        if DRIFT in self.rule.slots:
            raise InputError(f"Lookahead takes a rule that has no slot {DRIFT!r} of its own, such as SGD(); got {self.rule}.")

    @property
    def linear(self) -> bool:
        """Whether (θ', o') is linear in (θ, o, g), with the same coefficients for every coordinate: if the inner rule is."""
        return getattr(self.rule, "linear", False)

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of the inner rule, and the drift."""
        return (*self.rule.slots, DRIFT)

    @property
    def torch_slots(self) -> dict[str, str]:
        """Those of the inner rule, and the drift under its own name."""
        return {**self.rule.torch_slots, DRIFT: DRIFT}

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (θ', {o', D'}) by the equations above.

        Args:
            parameter: θ.
            slots: those of the inner rule, and "drift" D.
            gradient: g.
            hyper: those of the inner rule; lookahead_share; optional synchronise, 1 in a step that goes back and else 0.

        Returns:
            θ' and the slots after the step.
        """
        inner = {name: slots[name] for name in self.rule.slots}
        moved, inner = self.rule.apply(parameter, inner, gradient, hyper)
        drift = slots[DRIFT] + (moved - parameter)
        synchronise = hyper.get("synchronise", 0.0)
        if not is_zero(synchronise):
            moved = add_scaled(moved, drift, -(synchronise * (1 - hyper["lookahead_share"])))
            drift = drift * (1 - synchronise) if isinstance(synchronise, Tensor) else torch.zeros_like(drift)
        return moved, {**inner, DRIFT: drift}

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return s = a · s of the inner rule.

        Args:
            slots: Those after the step.
            hyper: As for ``apply``.

        Returns:
            s [θ²/loss], with the sign of the inner one.
        """
        return hyper["lookahead_share"] * self.rule.step_size(
            {name: slots[name] for name in self.rule.slots if name in slots}, hyper
        )

    def hyper_from_torch(self, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return the hyperparameters of the coming step of a ``retrograd.optim.Lookahead``.

        Args:
            group: The parameter group.
            state: The optimizer's state of one of its parameters before the step; may be empty.

        Returns:
            Those of the inner rule, lookahead_share, synchronise, and step: the inner rule's count if it has one, else how many
            steps there were, from 1.
        """
        count = steps_taken(state) + 1
        return {
            "step": float(count),
            **self.rule.hyper_from_torch(group, state),
            "lookahead_share": float(group["lookahead_share"]),
            "synchronise": float(count % group["lookahead_steps"] == 0),
        }
