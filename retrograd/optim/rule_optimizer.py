"""Optimizers whose step is an update rule of this library: the rule says what, this says when and where.

Each step asks the rule for the hyperparameters h of every parameter (``hyper_from_torch``), and then either applies the rule to
one parameter after the other, or, with ``foreach``, moves all parameters of a group that have the same h in place and together,
by ``torch._foreach_*`` functions: the same operations in the same order, fewer kernels, no temporary copy of a parameter. On
CPU both give the same bits in float32 and float64. In half precision torch's in-place products round a factor otherwise: there
``foreach=False`` is what a replay repeats bit for bit.

What is in ``state`` is named by the rule's ``torch_slots``, and groups hold plain numbers only (a complex β as modulus and
argument), so that schedulers can write them and ``torch.save`` needs no trust to read them back.
"""

import cmath
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.errors import InputError, UnknownOptimizer
from retrograd.optim.checked import CheckedOptimizer
from retrograd.update_rules import TorchRule
from retrograd.update_rules.torch_options import OWN_RULE, name_of

Numbers = Mapping[str, float]
"""h of one step, as ``hyper_from_torch`` gives it."""


class RuleOptimizer(CheckedOptimizer):
    """What the optimizers that are built on an update rule share.

    Args:
        params: As for any ``torch.optim`` optimizer; groups may have options of their own.
        defaults: The options: ``lr``, ``weight_decay``, ``maximize``, ``foreach`` and those of the subclass.

    Raises:
        InputError: An option is out of its range, or a parameter is complex.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ what an optimizer says of itself

    @abstractmethod
    def _rule(self, group: Mapping[str, Any]) -> TorchRule:
        """Return the update rule of one group."""

    @abstractmethod
    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        """Do in place what the rule does: leaves that share h, and their gradients, with sign and weight decay in them."""

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless the options of a group are allowed."""
        for name in ("lr", "weight_decay"):
            check_number(name, group[name])

    # ------------------------------------------------------------------ the face of torch.optim

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters that have a gradient.

        Args:
            closure: Evaluates the loss and its gradients anew; called once.

        Returns:
            What the closure returns, or None without one.

        Raises:
            InputError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[leaf for leaf in group["params"] if leaf.grad is not None] for group in self.param_groups]
        for leaf in (leaf for leaves in moving for leaf in leaves):
            if leaf.grad is not None and leaf.grad.layout != torch.strided:
                raise InputError(
                    f"a gradient is sparse; {type(self).__name__} takes dense ones. Make the module with sparse=False, or give "
                    "its parameters to an optimizer of their own."
                )
        for group, leaves in zip(self.param_groups, moving, strict=True):
            self._step_group(group, leaves)
        return loss

    # ------------------------------------------------------------------ one group

    def _step_group(self, group: dict[str, Any], leaves: list[Tensor]) -> None:
        rule = self._rule(group)
        alike: dict[tuple[tuple[str, float], ...], list[Tensor]] = {}
        for leaf in leaves:
            alike.setdefault(tuple(rule.hyper_from_torch(group, self.state[leaf]).items()), []).append(leaf)
        for numbers, together in alike.items():
            hyper = dict(numbers)
            if group["foreach"]:
                self._move(group, hyper, together, _directions(group, together))
            else:
                for leaf in together:
                    self._apply(rule, hyper, leaf)
            if "step" in hyper:
                for leaf in together:
                    self.state[leaf]["step"] = torch.tensor(hyper["step"], dtype=torch.float32)

    def _apply(self, rule: TorchRule, hyper: Numbers, leaf: Tensor) -> None:
        assert leaf.grad is not None
        keys = {slot: rule.torch_slots[slot] for slot in rule.slots}
        slots = {slot: self._slots([leaf], key)[0] for slot, key in keys.items()}
        moved, new = rule.apply(leaf, slots, leaf.grad, hyper)
        leaf.copy_(moved)
        for slot, key in keys.items():
            self.state[leaf][key] = new[slot]

    def _slots(self, leaves: list[Tensor], key: str) -> list[Tensor]:
        """Return the slots of this name, zeros where there is none yet."""
        for leaf in leaves:
            if self.state[leaf].get(key) is None:
                self.state[leaf][key] = torch.zeros_like(leaf, memory_format=torch.preserve_format)
        return [self.state[leaf][key] for leaf in leaves]

    def _agreed(self) -> Any:
        """Return the one rule of all groups, or raise ``UnknownOptimizer``."""
        rules = [self._rule(group) for group in self.param_groups]
        if any(rule != rules[0] for rule in rules):
            raise UnknownOptimizer(
                f"{name_of(self)} has parameter groups with different update rules, {rules}; allowed is one for all of them. "
                f"Use two optimizers. {OWN_RULE}"
            )
        return rules[0]


def polar(number: float | complex) -> tuple[float, float]:
    """Return a number as (modulus, argument), a real one as (itself, 0) whatever its sign.

    >>> polar(-0.5), polar(0.5j)[0], round(polar(0.5j)[1], 4)
    ((-0.5, 0.0), 0.5, 1.5708)
    """
    number = complex(number)
    return (number.real, 0.0) if number.imag == 0 else cmath.polar(number)


def check_number(name: str, value: Any) -> None:
    """Raise ``InputError`` unless a value is a finite number, 0 or more."""
    if not 0 <= float(value) < math.inf:
        raise InputError(f"{name} must be a finite number, 0 or more, got {value}.")


def check_factor(name: str, modulus: float, argument: float) -> None:
    """Raise ``InputError`` unless a complex factor lies within the unit circle, so that a velocity dies out."""
    if not (abs(modulus) < 1 and math.isfinite(argument)):
        given = f"{modulus}" if argument == 0 else f"modulus {modulus} and argument {argument}"
        raise InputError(f"{name} must have a modulus below 1 and a finite argument (radians), got {given}.")


def check_betas(betas: Any) -> None:
    """Raise ``InputError`` unless these are two real numbers, 0 ≤ β < 1."""
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise InputError(f"betas must be two numbers, 0 or more and below 1, got {betas}.")


def _directions(group: Mapping[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients, which are not to be written to, or copies with sign and weight decay in them."""
    directions = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if group["maximize"]:
        directions = list(torch._foreach_neg(directions))  # pyright: ignore[reportPrivateImportUsage]
    if group["weight_decay"]:
        added = torch._foreach_add(directions, leaves, alpha=group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        directions = list(added)
    return directions
