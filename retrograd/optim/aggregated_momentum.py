"""Stochastic gradient descent with aggregated momentum.

    v_k' = β_k v_k − g         θ' = θ + (η / K) Σ_k v_k'

Equations, symbols, assumptions, cost and references: ``update_rules/aggregated_momentum.py``, whose rule it equals bit for bit
on CPU.
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.optim.rule_optimizer import Numbers, RuleOptimizer
from retrograd.update_rules import AggregatedMomentum
from retrograd.update_rules.aggregated_momentum import check_dampings


class AggregatedSGD(RuleOptimizer):
    """SGD with aggregated momentum, in the place of ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups.
        lr: η, the learning rate.
        dampings: β_k, one velocity each, real and between −1 and 1. The paper takes 0, 0.9, 0.99, …
        weight_decay: λ, added to the gradient.
        maximize: Whether the objective is to grow.
        foreach: Whether to move the parameters of a group together, or one by one, which is slower and needs less memory.

    Raises:
        InputError: An option is out of its range.

    One damping is SGD with momentum, and this one is negative, which ``torch.optim.SGD`` does not take: 1, then 1 − ½.

    >>> theta = torch.nn.Parameter(torch.tensor(0.0))
    >>> optimizer = AggregatedSGD([theta], lr=0.1, dampings=(-0.5,))
    >>> for _ in range(2):
    ...     theta.grad = torch.tensor(1.0)
    ...     optimizer.step()
    >>> round(theta.item(), 6), -0.1 * (1 + 0.5)
    (-0.15, -0.15000000000000002)
    """

    citation: ClassVar[str] = """@inproceedings{lucas2019aggregated,
  title = {Aggregated Momentum: Stability Through Passive Damping},
  author = {Lucas, James and Sun, Shengyang and Zemel, Richard and Grosse, Roger},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        dampings: Sequence[float] = (0.0, 0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ):
        options = {"lr": lr, "dampings": dampings, "weight_decay": weight_decay}
        super().__init__(params, self._plain({**options, "maximize": maximize, "foreach": foreach}))

    def update_rule(self) -> AggregatedMomentum:
        """Return the update rule that this optimizer equals.

        Raises:
            UnknownOptimizer: Groups differ in their dampings or in ``maximize``.
        """
        return self._agreed()

    def _rule(self, group: Mapping[str, Any]) -> AggregatedMomentum:
        return AggregatedMomentum(tuple(group["dampings"]), group["maximize"])

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        if isinstance(group.get("dampings"), list):
            group["dampings"] = tuple(group["dampings"])
        return group

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        check_dampings(group["dampings"])

    def _move(self, group: Mapping[str, Any], hyper: Numbers, leaves: list[Tensor], directions: list[Tensor]) -> None:
        share = hyper["learning_rate"] / len(group["dampings"])
        for index, damping in enumerate(group["dampings"]):
            velocities = self._slots(leaves, f"velocity_{index}")
            torch._foreach_mul_(velocities, damping)
            torch._foreach_add_(velocities, directions, alpha=-1.0)
            torch._foreach_add_(leaves, velocities, alpha=share)
