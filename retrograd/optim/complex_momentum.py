"""Stochastic gradient descent with complex momentum, for games.

    μ' = β μ − g         θ' = θ + Re(α μ')         α, β complex

Equations, symbols, assumptions, cost and references: ``update_rules/complex_momentum.py``, whose rule it equals bit for bit on
CPU.
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

import cmath
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.errors import InputError
from retrograd.optim.rule_optimizer import Numbers, RuleOptimizer, check_factor, polar
from retrograd.update_rules import ComplexMomentum
from retrograd.update_rules.complex_momentum import cartesian

COMPLEX_MOMENTUM = """@inproceedings{lorraine2022complex,
  title = {Complex Momentum for Optimization in Games},
  author = {Lorraine, Jonathan and Acuna, David and Vicol, Paul and Duvenaud, David},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year = {2022}
}"""


def turn_velocity(reals: list[Tensor], imaginaries: list[Tensor], directions: list[Tensor], factor: tuple[Any, Any]) -> None:
    """Make β μ − g of μ in place, with the operations of the rule."""
    by_real, by_imaginary = factor
    turned = torch._foreach_mul(imaginaries, by_real)
    if by_imaginary != 0:
        torch._foreach_add_(turned, reals, alpha=by_imaginary)
    torch._foreach_mul_(reals, by_real)
    if by_imaginary != 0:
        torch._foreach_add_(reals, imaginaries, alpha=-by_imaginary)
    torch._foreach_add_(reals, directions, alpha=-1.0)
    torch._foreach_copy_(imaginaries, turned)


class ComplexSGD(RuleOptimizer):
    """SGD with complex momentum, in the place of ``torch.optim.SGD``.

    A group holds moduli, ``lr`` and ``momentum``, and ``lr_argument`` and ``momentum_argument`` in radians: plain numbers,
    which schedulers may change. A real β of either sign has argument 0, and a negative one a negative ``momentum``.

    Args:
        params: Parameters or parameter groups. A group may have an own ``lr`` and ``beta``.
        lr: α, the learning rate. Real is the recommendation; a complex one helps where the game hardly does anything but turn.
        beta: β, the momentum, of modulus below 1. Begin with an argument of π/8 and tune ``lr``. Real: ordinary momentum,
            negative too.
        weight_decay: λ, added to the gradient.
        maximize: Whether the objective is to grow.
        foreach: Whether to move the parameters of a group together, or one by one, which is slower and needs less memory.

    Raises:
        InputError: An option is out of its range.

    On the game x y gradient descent leaves the equilibrium 0 with any real momentum; not so with a complex one.

    >>> def distance(beta):
    ...     point = torch.nn.Parameter(torch.ones(2))
    ...     optimizer = ComplexSGD([point], lr=0.1, beta=beta)
    ...     for _ in range(500):
    ...         point.grad = torch.stack([point[1], -point[0]]).detach()
    ...         optimizer.step()
    ...     return point.norm().item()
    >>> distance(0.8 * cmath.exp(1j * math.pi / 8)) < 1e-3, distance(0.8) > 1e3, distance(-0.3) > 1
    (True, True, True)
    """

    citation: ClassVar[str] = COMPLEX_MOMENTUM

    def __init__(
        self,
        params: ParamsT,
        lr: float | complex | Tensor = 1e-3,
        beta: float | complex = 0.8 * cmath.exp(1j * math.pi / 8),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ):
        defaults = {"lr": lr, "lr_argument": 0.0, "beta": beta, "weight_decay": weight_decay}
        super().__init__(params, self._plain({**defaults, "maximize": maximize, "foreach": foreach}))

    def update_rule(self) -> ComplexMomentum:
        """Return the update rule that this optimizer equals.

        Raises:
            UnknownOptimizer: Groups differ in ``maximize``.
        """
        return self._agreed()

    def _rule(self, group: Mapping[str, Any]) -> ComplexMomentum:
        return ComplexMomentum(group["maximize"])

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        if "beta" in group:
            group["momentum"], group["momentum_argument"] = polar(group.pop("beta"))
        if isinstance(group.get("lr"), complex):
            group["lr"], group["lr_argument"] = polar(group["lr"])
        elif "lr" in group:
            group.setdefault("lr_argument", 0.0)
        return group

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        check_factor("beta", group["momentum"], group["momentum_argument"])
        if not math.isfinite(group["lr_argument"]):
            raise InputError(f"the argument of lr must be finite (radians), got {group['lr_argument']}.")

    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        reals, imaginaries = self._slots(leaves, "velocity_real"), self._slots(leaves, "velocity_imaginary")
        turn_velocity(reals, imaginaries, directions, cartesian(hyper["momentum"], hyper["momentum_argument"]))
        rate: Any = cartesian(hyper["learning_rate"], hyper["learning_rate_argument"])
        torch._foreach_add_(leaves, reals, alpha=rate[0])
        if rate[1] != 0:
            torch._foreach_add_(leaves, imaginaries, alpha=-rate[1])
