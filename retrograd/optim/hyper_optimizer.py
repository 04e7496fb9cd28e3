"""Optimizers that learn their own learning rate by gradient descent while they train.

    θ_{t+1} = θ_t − α_t d_t                                            d_t: direction of the base optimizer, see the subclasses
    ∂L_{t+1}/∂α = ⟨g_{t+1}, ∂θ_{t+1}/∂α⟩ = −⟨g_{t+1}, d_t⟩               (Chandra et al. 2022, section 2; Baydin et al. 2018)
    α_{t+1} = η_{t+1} e^{ρ_{t+1}},   ρ_{t+1} = ρ_t + s_t               s_t: one step down that slope, see ``hyper_levels.py``

θ, g    parameters, and the gradient as ``step`` finds it: of the next batch, with whatever the loop did to it;
α       the learning rate that is applied;   η   ``group["lr"]``, which belongs to the user and to schedulers;
ρ       the learned logarithm, 0 at the start, one for each parameter group;
κ       ``hyper_lr``, the rate at which ρ learns, itself learned at the rate ``hyper_hyper_lr`` if that is not 0.

The order is that of the paper: a gradient first moves the top of the tower, then what is below it, and the parameters last. As
d_t is kept from the step before, nothing has to be differentiated twice: one ordinary ``loss.backward()``, no ``create_graph``,
no graph between steps, and parameters updated in place.

Assumes that a rate good for the next batch is good: the derivative ends one step ahead ("greedy"). Far below the best rate it
agrees with the exact derivative of the final loss. Near the best rate it exaggerates and then has the wrong sign, as noise and
curvature make the next batch prefer small rates: see ``docs/optimizers.md``. So it finds a rate of the right size from a start
that is wrong by powers of ten; it does not find the best one, nor a schedule. A third level changes nothing that we could
measure; it is there to show that. From a start that is far too high Adam does not recover.

Cost: an inner product with the gradient and one vector of the parameters' size (none beside momentum that is not Nesterov's).
Each step waits once for the device, to read one number a group. Sparse gradients are refused.

References: Chandra, Xie, Ragan-Kelley & Meijer, "Gradient descent: the ultimate optimizer", NeurIPS 2022; Baydin et al.,
"Online learning rate adaptation with hypergradient descent", ICLR 2018; Wu et al., "Understanding short-horizon bias in
stochastic meta-optimization", ICLR 2018.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retrograd.errors import InputError, NonFinite
from retrograd.optim.checked import CheckedOptimizer
from retrograd.optim.hyper_levels import RULES, START, Level, learned

RATE = "lr"
CITATION = """@inproceedings{chandra2022gradient,
  title = {Gradient Descent: The Ultimate Optimizer},
  author = {Chandra, Kartik and Xie, Audrey and Ragan-Kelley, Jonathan and Meijer, Erik},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}"""


class HyperOptimizer(CheckedOptimizer):
    """What `HyperSGD` and `HyperAdam` share: when hyperparameters are learned, and how that is kept and reported.

    Everything that is learned is in ``group["learned"]``, plain numbers, and so in ``state_dict()``. What a ``torch.optim``
    optimizer of this kind has saved can be loaded, too: learning then begins at the factor 1. To freeze what was
    learned, set ``group["hyper_lr"] = 0.0``.

    Args:
        params: As for any ``torch.optim`` optimizer; groups may have options of their own.
        defaults: The options, those of every level among them.

    Raises:
        InputError: An option is out of its range, or a parameter is complex.
    """

    citation: ClassVar[str] = CITATION

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        super().__init__(params, {**defaults, "learned": {}, "applied_lr": 0.0})

    # ------------------------------------------------------------------ what a base optimizer says of itself

    @abstractmethod
    def _move(self, group: dict[str, Any], leaves: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        """Move the leaves in place at the rate α; keep −(1/α) ∂θ'/∂ρ of what is learned under ``direction_of(name)``."""

    def _learns(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the names of what the group learns → the rate κ of each; what learns nothing costs nothing."""
        return {RATE: group["hyper_lr"]} if group["hyper_lr"] else {}

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless the options of a group are allowed."""
        if group["hyper"] not in RULES:
            raise InputError(f"hyper is the rule by which rates are learned, 'sgd' or 'adam', got {group['hyper']!r}.")
        for name in ("lr", "weight_decay", "hyper_lr", "hyper_hyper_lr"):
            if not 0 <= float(group[name]) < math.inf:
                raise InputError(f"{name} must be a finite number, 0 or more, got {group[name]}.")
        if not 0 < group["hyper_clip"] < math.inf:
            raise InputError(f"hyper_clip bounds one step of a logarithm: finite and above 0, got {group['hyper_clip']}.")

    # ------------------------------------------------------------------ the face of torch.optim

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Learn the hyperparameters from this gradient and the last step, then move the parameters.

        Args:
            closure: Evaluates the loss and its gradients anew; called once.

        Returns:
            What the closure returns, or None without one.

        Raises:
            InputError: A gradient is sparse.
            NonFinite: A hypergradient is. Nothing has been changed then: neither parameters nor what was learned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[leaf for leaf in group["params"] if leaf.grad is not None] for group in self.param_groups]
        gradients = [self._gradients(group, leaves) for group, leaves in zip(self.param_groups, moving, strict=True)]
        self._learn(moving, gradients)
        for group, leaves, own in zip(self.param_groups, moving, gradients, strict=True):
            self._forget(group)
            group["applied_lr"] = self._rate(group)
            if leaves:
                self._move(group, leaves, own, group["applied_lr"])
        return loss

    def hyperparameters(self) -> list[dict[str, float]]:
        """Return the hyperparameters of each group's coming step, should nothing more be learned before it.

        Returns:
            ``learning_rate`` α, and ``hyper_learning_rate`` κ; more in subclasses.
        """
        return [
            {"learning_rate": self._rate(group), "hyper_learning_rate": self._factor(group, "hyper_lr") * group["hyper_lr"]}
            for group in self.param_groups
        ]

    # ------------------------------------------------------------------ learning

    def _learn(self, moving: Sequence[list[Tensor]], gradients: Sequence[list[Tensor]]) -> None:
        """Update every learned number, once all of them are known to be finite."""
        asked: list[tuple[int, str, float, int]] = []
        products: list[Tensor] = []
        for index, (group, leaves, own) in enumerate(zip(self.param_groups, moving, gradients, strict=True)):
            for name, rate in self._learns(group).items():
                old = [self.state[leaf].get(direction_of(name)) for leaf in leaves]
                parts = [_inner(new, last) for new, last in zip(own, old, strict=True) if last is not None]
                # A rate of 0, as a warm-up may start with, has no logarithm to learn from.
                if parts and group["applied_lr"] > 0:
                    asked.append((index, name, rate, len(parts)))
                    products += parts
        if not products:
            return
        numbers = iter(torch.stack([product.to(products[0].device) for product in products]).tolist())  # the one wait
        slopes = [-sum(next(numbers) for _ in range(count)) for *_, count in asked]
        for (index, name, *_), slope in zip(asked, slopes, strict=True):
            if not math.isfinite(slope):
                raise NonFinite(self._blame(index, name, slope))
        for (index, name, rate, _), slope in zip(asked, slopes, strict=True):
            group = self.param_groups[index]
            _learn_one(group, name, rate, group["applied_lr"] * slope)

    def _gradients(self, group: Mapping[str, Any], leaves: list[Tensor]) -> list[Tensor]:
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if any(gradient.layout != torch.strided for gradient in found):
            raise InputError(
                f"a gradient is sparse; {type(self).__name__} takes dense ones, since its directions are dense. Make the "
                "module with sparse=False, or give its parameters to an optimizer of their own."
            )
        return [-gradient for gradient in found] if group["maximize"] else found

    def _forget(self, group: Mapping[str, Any]) -> None:
        """Drop directions that the next gradient can't judge: of what does not move now, or of what is learned no more."""
        kept = {direction_of(name) for name in self._learns(group)}
        for leaf in group["params"]:
            for key in [key for key in self.state.get(leaf, ()) if key.startswith(direction_of(""))]:
                if key not in kept or leaf.grad is None:
                    del self.state[leaf][key]

    def _factor(self, group: Mapping[str, Any], name: str) -> float:
        return math.exp(group["learned"].get(name, START)["value"])

    def _rate(self, group: Mapping[str, Any]) -> float:
        return float(group["lr"]) * self._factor(group, RATE)

    def _blame(self, index: int, name: str, value: float) -> str:
        group = self.param_groups[index]
        made = int(group["learned"].get(name, START)["step"])
        text = f"the hypergradient of parameter group {index} is {value} after {made} finite ones"
        advice = "Nothing was changed. Lower lr or hyper_lr, or clip the gradient."
        for number, leaf in enumerate(group["params"]):
            last = self.state.get(leaf, {}).get(direction_of(name))
            for what, tensor in (("gradient", leaf.grad), ("last direction", last)):
                if tensor is not None and not torch.isfinite(tensor).all():
                    which = group["param_names"][number] if "param_names" in group else f"number {number}"
                    return f"{text}: the {what} of parameter {which}, shape {tuple(leaf.shape)}, is not finite. {advice}"
        return f"{text}: its inner product overflows, though gradients are finite. {advice}"


def direction_of(name: str) -> str:
    """Return the key in ``state`` of −(1/α) ∂θ'/∂ρ, with ρ the logarithm or logit of what is called ``name``."""
    return f"direction_{name}"


def _learn_one(group: dict[str, Any], name: str, rate: float, gradient: float) -> None:
    """Learn one number of a group from ∂L/∂ρ; the level above it first, if there is one."""
    level, learned_so_far = group["learned"].get(name, START), dict[str, Level](group["learned"])
    options = {"rule": group["hyper"], "clip": group["hyper_clip"]}
    is_rate = name == RATE
    if is_rate:
        above = learned_so_far.get("hyper_lr", START)
        now = rate * math.exp(above["value"])
        if group["hyper_hyper_lr"] and level["step"]:
            above = learned(above, gradient * level["response"], rate=group["hyper_hyper_lr"], at=now, **options)
            learned_so_far["hyper_lr"] = above
        rate *= math.exp(above["value"])
    learned_so_far[name] = learned(level, gradient, rate=rate, at=group["applied_lr"] if is_rate else None, **options)
    group["learned"] = learned_so_far


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return ⟨left, right⟩ without a product of their size in memory; float16 would overflow, bfloat16 lose digits."""
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()
    return torch.dot(left.reshape(-1), right.reshape(-1))
