"""Optimistic gradient descent and optimistic Adam, for games.

    θ' = θ − η [(1 + ρ) d − ρ d₋]         d: the gradient, or the direction of Adam; d₋: that of the last step

Equations, symbols, assumptions, cost and references: ``update_rules/optimistic.py``, whose rules they equal bit for bit on CPU.
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.optim.complex_adam import denominators
from retrograd.optim.rule_optimizer import Numbers, RuleOptimizer, check_betas, check_number
from retrograd.update_rules import OptimisticAdam as AdamRule
from retrograd.update_rules import OptimisticGradient

OPTIMISM = """@inproceedings{daskalakis2018training,
  title = {Training {GAN}s with Optimism},
  author = {Daskalakis, Constantinos and Ilyas, Andrew and Syrgkanis, Vasilis and Zeng, Haoyang},
  booktitle = {International Conference on Learning Representations},
  year = {2018}
}"""


class _Optimistic(RuleOptimizer):
    """What the two share."""

    citation: ClassVar[str] = OPTIMISM

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        check_number("optimism", group["optimism"])

    def _go(self, hyper: Numbers, leaves: list[Tensor], directions: list[Tensor], key: str) -> None:
        """Step along the directions and keep them for the next step; they are not written to."""
        optimism = hyper["optimism"] * hyper["has_previous"]
        previous = self._slots(leaves, key)
        torch._foreach_add_(leaves, directions, alpha=-(hyper["learning_rate"] * (1 + optimism)))
        if optimism != 0:
            torch._foreach_add_(leaves, previous, alpha=hyper["learning_rate"] * optimism)
        torch._foreach_copy_(previous, directions)


class OptimisticSGD(_Optimistic):
    """Optimistic gradient descent, in the place of ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups.
        lr: η, the learning rate.
        optimism: ρ. With 1 this is the method of the paper, with 0 gradient descent.
        weight_decay: λ, added to the gradient.
        maximize: Whether the objective is to grow.
        foreach: Whether to move the parameters of a group together, or one by one, which is slower and needs less memory.

    Raises:
        InputError: An option is out of its range.

    Gradients 1 and then 3: 0.1 · 1, and then 0.1 · (2 · 3 − 1).

    >>> theta = torch.nn.Parameter(torch.tensor(0.0))
    >>> optimizer = OptimisticSGD([theta], lr=0.1)
    >>> for gradient in (1.0, 3.0):
    ...     theta.grad = torch.tensor(gradient)
    ...     optimizer.step()
    >>> round(theta.item(), 6), -0.1 * (1 + 5)
    (-0.6, -0.6000000000000001)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        optimism: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ):
        options = {"lr": lr, "optimism": optimism, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize, "foreach": foreach})

    def update_rule(self) -> OptimisticGradient:
        """Return the update rule that this optimizer equals.

        Raises:
            UnknownOptimizer: Groups differ in ``maximize``.
        """
        return self._agreed()

    def _rule(self, group: Mapping[str, Any]) -> OptimisticGradient:
        return OptimisticGradient(group["maximize"])

    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        self._go(hyper, leaves, directions, "previous_gradient")


class OptimisticAdam(_Optimistic):
    """Optimistic Adam, in the place of ``torch.optim.Adam``.

    Args:
        params: Parameters or parameter groups.
        lr: η, the learning rate.
        betas: β₁ and β₂.
        eps: ε.
        optimism: ρ. With 1 this is the method of the paper, with 0 Adam.
        weight_decay: λ, added to the gradient.
        maximize: Whether the objective is to grow.
        foreach: Whether to move the parameters of a group together, or one by one, which is slower and needs less memory.

    Raises:
        InputError: An option is out of its range.

    The first step is ``lr`` whatever the gradient's size, and so is the second if the gradient stays.

    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = OptimisticAdam([theta], lr=0.1)
    >>> for _ in range(2):
    ...     theta.grad = torch.tensor([3.0, -0.5])
    ...     optimizer.step()
    >>> theta.detach()
    tensor([0.8000, 1.2000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        optimism: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "optimism": optimism, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize, "foreach": foreach})

    def update_rule(self) -> AdamRule:
        """Return the update rule that this optimizer equals.

        Raises:
            UnknownOptimizer: Groups differ in ``maximize``.
        """
        return self._agreed()

    def _rule(self, group: Mapping[str, Any]) -> AdamRule:
        return AdamRule(group["maximize"])

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"])

    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        firsts, seconds = self._slots(leaves, "exp_avg"), self._slots(leaves, "exp_avg_sq")
        torch._foreach_lerp_(firsts, directions, 1 - hyper["beta1"])
        torch._foreach_mul_(seconds, hyper["beta2"])
        torch._foreach_addcmul_(seconds, directions, directions, value=1 - hyper["beta2"])
        own = list(torch._foreach_div(firsts, 1 - hyper["beta1"] ** hyper["step"]))
        torch._foreach_div_(own, denominators(seconds, hyper))
        self._go(hyper, leaves, own, "previous_direction")
