"""Stochastic gradient descent whose learning rate is learned.

    b' = μ b + (1 − d)(g + λ θ)        d_t = b', or g + λθ + μ b' with Nesterov, or g + λθ without momentum
    θ' = θ − α d_t                     ∂θ'/∂α = −d_t

Symbols: those of ``update_rules/sgd.py``, and of ``hyper_optimizer.py`` for how α is learned. The derivative is that of one
step: b and g, too, depend on earlier rates, and that is left out.

Equals ``torch.optim.SGD`` bit for bit where nothing is learned (``hyper_lr=0``).
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.errors import InputError
from retrograd.optim.hyper_optimizer import RATE, HyperOptimizer, direction_of


class HyperSGD(HyperOptimizer):
    """SGD with a learned learning rate, in the place of ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups. Each group learns a rate of its own.
        lr: η, the learning rate at the start. A scheduler changes it; what is applied is η times the learned factor.
        momentum: μ.
        dampening: d.
        weight_decay: λ.
        nesterov: Whether to take Nesterov's direction.
        maximize: Whether the objective is to grow.
        hyper: How the rate is learned: ``"sgd"`` takes the steps of the paper, with a ``hyper_lr`` that depends on the size of
            gradients; ``"adam"`` changes the logarithm by about ``hyper_lr`` a step, whatever their size.
        hyper_lr: κ. With 0 this is plain SGD, at no cost.
        hyper_clip: The logarithm of the rate changes by no more than this in a step.
        hyper_hyper_lr: The rate at which κ is learned, too. Expect nothing of it.

    Raises:
        InputError: An option is out of its range.

    On ½θ² from 1 the directions are 1 and then θ = 0.9, so that α becomes 0.1 + 0.05 · 0.9 · 1 before the second step.

    >>> theta = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    >>> optimizer = HyperSGD([theta], lr=0.1, hyper="sgd", hyper_lr=0.05)
    >>> for _ in range(2):
    ...     theta.grad = theta.detach().clone()
    ...     optimizer.step()
    >>> round(optimizer.hyperparameters()[0]["learning_rate"], 12), round(theta.item(), 12), round(0.9 - 0.145 * 0.9, 12)
    (0.145, 0.7695, 0.7695)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        hyper: str = "adam",
        hyper_lr: float = 0.03,
        hyper_clip: float = 1.0,
        hyper_hyper_lr: float = 0.0,
    ):
        own = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        above = {"hyper": hyper, "hyper_lr": hyper_lr, "hyper_clip": hyper_clip, "hyper_hyper_lr": hyper_hyper_lr}
        super().__init__(params, {**own, "maximize": maximize, **above})

    def _check(self, group: Any) -> None:
        super()._check(group)
        if not group["momentum"] >= 0:
            raise InputError(f"momentum must be 0 or more, got {group['momentum']}.")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise InputError(
                f"nesterov needs momentum above 0 and no dampening, got {group['momentum']} and {group['dampening']}."
            )

    def _move(self, group: dict[str, Any], leaves: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        directions = gradients
        if group["weight_decay"]:
            directions = torch._foreach_add(directions, leaves, alpha=group["weight_decay"])
        if group["momentum"]:
            velocities = self._velocities(group, leaves, directions)
            if group["nesterov"]:
                directions = torch._foreach_add(directions, velocities, alpha=group["momentum"])
            else:
                directions = velocities
        torch._foreach_add_(leaves, directions, alpha=-rate)
        if self._learns(group):
            for leaf, direction in zip(leaves, directions, strict=True):
                # A velocity is still there at the next step; the gradient, which belongs to the loop, is not.
                self.state[leaf][direction_of(RATE)] = direction.clone() if direction is leaf.grad else direction

    def _velocities(self, group: dict[str, Any], leaves: list[Tensor], directions: Any) -> list[Tensor]:
        """Return b', in place where there is a b, and as torch does the first direction where there is none."""
        found = [self.state[leaf].get("momentum_buffer") for leaf in leaves]
        old = [(buffer, new) for buffer, new in zip(found, directions, strict=True) if buffer is not None]
        if old:
            buffers, added = [list(column) for column in zip(*old, strict=True)]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, added, alpha=1 - group["dampening"])
        made = [new.clone() if buffer is None else buffer for buffer, new in zip(found, directions, strict=True)]
        for leaf, buffer in zip(leaves, made, strict=True):
            self.state[leaf]["momentum_buffer"] = buffer
        return made
