"""Lookahead around another optimizer: k steps forward, then part of the way back.

    every k-th step    θ ← φ + a (θ − φ), and φ becomes θ         φ: where θ was after the last of them

Equations, symbols, assumptions and references: ``update_rules/lookahead.py``, whose rule it equals bit for bit on CPU where the
wrapped optimizer equals its own. Cost: one vector of the parameters' size, the drift θ − φ, and during a step one more.
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.optim.wrapper import WrappingOptimizer
from retrograd.update_rules import Lookahead as Rule
from retrograd.update_rules import rule_of
from retrograd.update_rules.lookahead import COUNT, DRIFT, steps_taken


class Lookahead(WrappingOptimizer):
    """Lookahead around any optimizer.

    Each group gets ``lookahead_steps`` and ``lookahead_share``, each parameter's state a count and its drift, all of it in
    ``state_dict()``. Evaluating with the slow weights is evaluating right after a step whose number k divides.

    Args:
        optimizer: The optimizer of the fast weights. In a game: one over all players, so that they go back together.
        k: steps from one synchronisation to the next.
        alpha: a, the share of the way that is kept, 0 < a ≤ 1.

    Raises:
        InputError: ``optimizer`` is not one, or is a `Lookahead` already, or ``k`` or ``alpha`` is out of its range.

    Two steps from 0 along a gradient of −1 come to 0.2; half of the way back is 0.1.

    >>> theta = torch.nn.Parameter(torch.tensor(0.0))
    >>> optimizer = Lookahead(torch.optim.SGD([theta], lr=0.1), k=2, alpha=0.5)
    >>> for _ in range(2):
    ...     theta.grad = torch.tensor(-1.0)
    ...     optimizer.step()
    ...     print(round(theta.item(), 6))
    0.1
    0.1
    """

    citation: ClassVar[str] = """@inproceedings{zhang2019lookahead,
  title = {Lookahead Optimizer: k Steps Forward, 1 Step Back},
  author = {Zhang, Michael R. and Lucas, James and Hinton, Geoffrey and Ba, Jimmy},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}
@inproceedings{chavdarova2021taming,
  title = {Taming {GAN}s with Lookahead-Minmax},
  author = {Chavdarova, Tatjana and Pagliardini, Matteo and Stich, Sebastian U. and Fleuret, Fran\\c{c}ois and Jaggi, Martin},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}"""

    _own: ClassVar[tuple[str, ...]] = ("optimizer", "_options")

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5):
        super().__init__(optimizer)
        inner: Any = optimizer
        while isinstance(inner, WrappingOptimizer):
            if isinstance(inner, Lookahead):
                raise InputError("Lookahead cannot go around another Lookahead; use one of them.")
            inner = inner.optimizer
        self._options = {"lookahead_steps": k, "lookahead_share": alpha}
        _check(self._options)
        self._complete_groups()

    def update_rule(self) -> Rule:
        """Return the rule: lookahead over that of the wrapped optimizer.

        Raises:
            UnknownOptimizer: No rule equals the wrapped optimizer.
        """
        return Rule(rule_of(self.optimizer))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer.

        Args:
            param_group: ``"params"``, and options; ``lookahead_steps`` and ``lookahead_share`` among them.

        Raises:
            InputError: One of these two is out of its range.
        """
        _check({**self._options, **param_group})
        super().add_param_group(param_group)
        self._complete_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, or the wrapped optimizer's own: then the drift begins at 0."""
        super().load_state_dict(state_dict)
        self._complete_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and go part of the way back if it is time.

        Args:
            closure: Handed on to the wrapped optimizer.

        Returns:
            What that returns.
        """
        self._complete_groups()
        held = [[(leaf, leaf.clone()) for leaf in group["params"] if leaf.requires_grad] for group in self.param_groups]
        counts = {leaf: steps_taken(self.state.get(leaf, {})) + 1 for own in held for leaf, _ in own}
        # Called with nothing where nothing was given: some optimizers take no closure.
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        for group, own in zip(self.param_groups, held, strict=True):
            moved = [(leaf, old) for leaf, old in own if leaf.grad is not None]
            if not moved:
                continue
            leaves, before = [list(column) for column in zip(*moved, strict=True)]
            drifts = self._drifts(leaves)
            torch._foreach_add_(drifts, torch._foreach_sub(leaves, before))
            for leaf in leaves:
                self.state[leaf][COUNT] = counts[leaf]
            back = [leaf for leaf in leaves if counts[leaf] % group["lookahead_steps"] == 0]
            if back:
                drifts = self._drifts(back)
                torch._foreach_add_(back, drifts, alpha=-(1 - group["lookahead_share"]))
                torch._foreach_zero_(drifts)
        return loss

    def _drifts(self, leaves: list[Tensor]) -> list[Tensor]:
        for leaf in leaves:
            # After the wrapped optimizer's first step: some begin their own state where there is none at all.
            if self.state[leaf].get(DRIFT) is None:
                self.state[leaf][DRIFT] = torch.zeros_like(leaf, memory_format=torch.preserve_format)
        return [self.state[leaf][DRIFT] for leaf in leaves]

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name, value in self._options.items():
                group.setdefault(name, value)


def _check(options: dict[str, Any]) -> None:
    steps, share = options["lookahead_steps"], options["lookahead_share"]
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"k counts the steps from one synchronisation to the next, 1 or more; got {steps}.")
    if not 0 < share <= 1:
        raise InputError(f"alpha is the share of the way that is kept, above 0 and at most 1; got {share}.")
