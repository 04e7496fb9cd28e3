"""Adam whose learning rate, and if asked its factors β, are learned.

    m' = β₁ m + (1 − β₁) g             v' = β₂ v + (1 − β₂) g²             m̂ = m'/c₁, v̂ = v'/c₂, cᵢ = 1 − βᵢᵗ
    θ' = θ − α d_t                     d_t = m̂ / (√v̂ + ε), plus λθ if the decay is decoupled (AdamW)

    −(1/α) ∂θ'/∂α  = d_t
    −(1/α) ∂θ'/∂β₁ = (∂m̂/∂β₁) / (√v̂ + ε)                                  ∂m̂/∂β₁ = (m − g)/c₁ + m' tβ₁ᵗ⁻¹/c₁²
    −(1/α) ∂θ'/∂β₂ = −m̂ / (√v̂ + ε)² · (∂v̂/∂β₂) / (2√v̂)                    ∂v̂/∂β₂ = (v − g²)/c₂ + v' tβ₂ᵗ⁻¹/c₂²

Symbols: those of ``update_rules/adam.py``, and of ``hyper_optimizer.py`` for how α is learned. The derivatives are those of one
step, m and v taken as given. Learned factors are those of ``group["betas"]`` moved on their logit, b = log(β/(1 − β)) with
∂β/∂b = β(1 − β): they stay between 0 and 1. As in the paper c is made with the factor of now, though older gradients were
averaged with others. At v' = 0 there is m' = 0 and nothing to learn: the derivative by β₂ is taken as 0.

The step sees β₁ only through the one gradient it has just taken in, and so this derivative can't know what averaging is for:
it is the paper's experiment, off unless asked for.

Equals ``torch.optim.Adam`` (``AdamW`` with ``decoupled_weight_decay``) bit for bit where nothing is learned. Cost of learned
factors: two more vectors of the parameters' size and some fifteen elementwise operations.
"""

# pyright: reportPrivateImportUsage=false
# torch documents the _foreach functions, but does not export them.

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.errors import InputError
from retrograd.optim.hyper_levels import START
from retrograd.optim.hyper_optimizer import RATE, HyperOptimizer, direction_of

BETAS = "beta1", "beta2"


class HyperAdam(HyperOptimizer):
    """Adam with a learned learning rate, in the place of ``torch.optim.Adam`` and ``AdamW``.

    Args:
        params: Parameters or parameter groups. Each group learns a rate of its own.
        lr: η, the learning rate at the start. A scheduler changes it; what is applied is η times the learned factor.
        betas: β₁ and β₂, at the start if they are learned.
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: Whether weight decay acts on the parameters, as AdamW's, and not through the gradient.
        maximize: Whether the objective is to grow.
        hyper: How the rate is learned: ``"sgd"`` takes the steps of the paper, with a ``hyper_lr`` that depends on the size of
            gradients; ``"adam"`` changes the logarithm by about ``hyper_lr`` a step, whatever their size.
        hyper_lr: κ. With 0 the rate is not learned; with ``beta_hyper_lr`` 0 as well this is plain Adam, at no cost.
        beta_hyper_lr: The rate at which the logits of β₁ and β₂ are learned, by the same rule.
        hyper_clip: No logarithm or logit changes by more than this in a step.
        hyper_hyper_lr: The rate at which κ is learned, too. Expect nothing of it.

    Raises:
        InputError: An option is out of its range.

    Adam's first direction is sign(g), and the second one, for the same gradient again, too: with Adam above it as well, log α
    takes a first step of 0.03.

    >>> theta = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    >>> optimizer = HyperAdam([theta], lr=0.1, eps=0.0, hyper_lr=0.03)
    >>> for _ in range(2):
    ...     theta.grad = torch.ones_like(theta)
    ...     optimizer.step()
    >>> round(theta.item(), 12), round(1 - 0.1 - 0.1 * math.exp(0.03), 12)
    (0.796954546605, 0.796954546605)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        hyper: str = "adam",
        hyper_lr: float = 0.03,
        beta_hyper_lr: float = 0.0,
        hyper_clip: float = 1.0,
        hyper_hyper_lr: float = 0.0,
    ):
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        above = {"hyper": hyper, "hyper_lr": hyper_lr, "beta_hyper_lr": beta_hyper_lr, "hyper_clip": hyper_clip}
        own |= {"decoupled_weight_decay": decoupled_weight_decay, "hyper_hyper_lr": hyper_hyper_lr}
        super().__init__(params, {**own, **above})

    def hyperparameters(self) -> list[dict[str, float]]:
        """Return the hyperparameters of each group's coming step, should nothing more be learned before it.

        Returns:
            ``learning_rate`` α, ``hyper_learning_rate`` κ, ``beta1`` and ``beta2``.
        """
        found = super().hyperparameters()
        for own, group in zip(found, self.param_groups, strict=True):
            own["beta1"], own["beta2"] = _betas(group)
        return found

    def _learns(self, group: Mapping[str, Any]) -> dict[str, float]:
        factors = {name: group["beta_hyper_lr"] for name in BETAS if group["beta_hyper_lr"]}
        return {**super()._learns(group), **factors}

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        lowest = "above" if group["beta_hyper_lr"] else "at least"
        for beta in group["betas"]:
            if not (0 <= beta < 1 and (beta > 0 or not group["beta_hyper_lr"])):
                raise InputError(f"betas must be {lowest} 0 and below 1, got {group['betas']}.")
        for name in ("eps", "beta_hyper_lr"):
            if not 0 <= group[name] < math.inf:
                raise InputError(f"{name} must be a finite number, 0 or more, got {group[name]}.")
        if group.get("amsgrad"):
            raise InputError("the state is of Adam with amsgrad=True, which takes other steps. Start with a new optimizer.")

    def _move(self, group: dict[str, Any], leaves: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        decay, learns = group["weight_decay"], self._learns(group)
        beta1, beta2 = _betas(group)
        firsts, seconds, steps = self._slots(leaves)
        decayed = None
        if decay and group["decoupled_weight_decay"]:
            decayed = torch._foreach_mul(leaves, decay) if RATE in learns else None
            torch._foreach_mul_(leaves, 1 - rate * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, leaves, alpha=decay))
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        corrections = [1 - beta1**step for step in steps]
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(leaves, firsts, denominators, [-(rate / correction) for correction in corrections])
        if group["beta_hyper_lr"]:
            for leaf, g, m, v, below, step in zip(leaves, gradients, firsts, seconds, denominators, steps, strict=True):
                found = _by_logits(g, m, v, below, step, beta1, beta2)
                self.state[leaf].update({direction_of(name): part for name, part in zip(BETAS, found, strict=True)})
        if RATE not in learns:
            return
        # θ' was not moved along these, because torch rounds in another order.
        torch._foreach_mul_(denominators, corrections)
        directions = torch._foreach_div(firsts, denominators)
        if decayed is not None:
            torch._foreach_add_(directions, decayed)
        for leaf, direction in zip(leaves, directions, strict=True):
            self.state[leaf][direction_of(RATE)] = direction

    def _slots(self, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Return m, v and t, counted on; where there are none yet, zeros. The names are torch's."""
        for leaf in leaves:
            own = self.state[leaf]
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in own:
                    own[name] = torch.zeros_like(leaf, memory_format=torch.preserve_format)
            own["step"] = int(own.get("step", 0)) + 1
        columns = [[self.state[leaf][name] for leaf in leaves] for name in ("exp_avg", "exp_avg_sq", "step")]
        return columns[0], columns[1], columns[2]


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return β₁ and β₂ with what was learned; untouched, to the last bit, where nothing was."""
    found = []
    for beta, name in zip(group["betas"], BETAS, strict=True):
        shift = group["learned"].get(name, START)["value"]
        found.append(1 / (1 + (1 - beta) / beta * math.exp(-shift)) if shift else float(beta))
    return found[0], found[1]


def _by_logits(
    gradient: Tensor, first: Tensor, second: Tensor, denominator: Tensor, step: int, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Return −(1/α) ∂θ'/∂b for the logits of β₁ and β₂, from m' and v': m − g = (m' − g)/β₁, and v likewise."""
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    by_beta1 = ((first - gradient) / (beta1 * c1) + first * (step * beta1 ** (step - 1) / c1**2)) / denominator
    square = (second - gradient * gradient) / (beta2 * c2) + second * (step * beta2 ** (step - 1) / c2**2)
    root = (second / c2).sqrt()
    by_beta2 = -(first / c1) / denominator**2 * square / (2 * root.masked_fill(root == 0, 1.0))
    return by_beta1 * (beta1 * (1 - beta1)), by_beta2 * (beta2 * (1 - beta2))
