"""Adam with a complex first factor, for games.

    μ' = β₁ μ − g      v' = β₂ v + (1 − β₂) g²      θ' = θ + (η / n) Re(μ') / (√(v'/c₂) + ε)

Equations, symbols, assumptions, cost and references: ``update_rules/complex_adam.py``, whose rule it equals bit for bit on CPU.
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
from retrograd.optim.complex_momentum import COMPLEX_MOMENTUM, turn_velocity
from retrograd.optim.rule_optimizer import Numbers, RuleOptimizer, check_betas, check_factor, check_number, polar
from retrograd.update_rules import ComplexAdam as Rule
from retrograd.update_rules.complex_adam import NORMALISATIONS, divisor
from retrograd.update_rules.complex_momentum import cartesian


def denominators(seconds: list[Tensor], hyper: Numbers) -> Any:
    """Return √(v/c₂) + ε of each, with the operations of the rule."""
    roots = torch._foreach_sqrt(seconds)
    torch._foreach_div_(roots, (1 - hyper["beta2"] ** hyper["step"]) ** 0.5)
    torch._foreach_add_(roots, hyper["epsilon"])
    return roots


class ComplexAdam(RuleOptimizer):
    """Adam with a complex first factor, in the place of ``torch.optim.Adam``.

    A group holds ``betas``, the modulus of β₁ and β₂, and ``beta1_argument`` in radians, plain numbers. A real β₁ of either
    sign has the argument 0.

    Args:
        params: Parameters or parameter groups. A group may have an own ``lr`` and ``betas``.
        lr: η, the learning rate.
        betas: β₁, complex with a modulus below 1, and β₂, real.
        eps: ε.
        weight_decay: λ, added to the gradient.
        normalise: ``"none"``, the paper's: a constant gradient moves a parameter by ``lr`` Re(1 / (1 − β₁)) a step in the end;
            or ``"dc"``: by ``lr``, as Adam, so that its learning rate can be taken over.
        maximize: Whether the objective is to grow.
        foreach: Whether to move the parameters of a group together, or one by one, which is slower and needs less memory.

    Raises:
        InputError: An option is out of its range.

    The first step is ``lr`` whatever the gradient's size.

    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = ComplexAdam([theta], lr=0.1, betas=(0.8 * cmath.exp(1j * math.pi / 8), 0.999))
    >>> theta.grad = torch.tensor([3.0, -0.5])
    >>> optimizer.step()
    >>> theta.detach()
    tensor([0.9000, 1.1000])
    """

    citation: ClassVar[str] = COMPLEX_MOMENTUM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | complex, float] = (0.8 * cmath.exp(1j * math.pi / 8), 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        normalise: str = "none",
        maximize: bool = False,
        foreach: bool = True,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "normalise": normalise}
        super().__init__(params, self._plain({**options, "maximize": maximize, "foreach": foreach}))

    def update_rule(self) -> Rule:
        """Return the update rule that this optimizer equals.

        Raises:
            UnknownOptimizer: Groups differ in ``normalise`` or in ``maximize``.
        """
        return self._agreed()

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return Rule(group["normalise"], group["maximize"])

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        if "betas" in group and "beta1_argument" not in group:
            first, second = group["betas"]
            modulus, group["beta1_argument"] = polar(first)
            group["betas"] = (modulus, second)
        return group

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        first, second = group["betas"]
        check_factor("betas[0]", first, group["beta1_argument"])
        check_betas((0.0, second))
        check_number("eps", group["eps"])
        if group["normalise"] not in NORMALISATIONS:
            raise InputError(f"normalise must be one of {NORMALISATIONS}, got {group['normalise']!r}.")

    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        factor = cartesian(hyper["beta1"], hyper["beta1_argument"])
        reals, imaginaries = self._slots(leaves, "exp_avg_real"), self._slots(leaves, "exp_avg_imaginary")
        seconds = self._slots(leaves, "exp_avg_sq")
        turn_velocity(reals, imaginaries, directions, factor)
        torch._foreach_mul_(seconds, hyper["beta2"])
        torch._foreach_addcmul_(seconds, directions, directions, value=1 - hyper["beta2"])
        rate: Any = hyper["learning_rate"] / divisor(group["normalise"], factor)
        torch._foreach_addcdiv_(leaves, reals, denominators(seconds, hyper), value=rate)
