"""Optimizers as pure functions, one a file, and which of them an optimizer is."""

from collections.abc import Mapping
from typing import Any, cast

import torch

from retrograd.errors import UnknownOptimizer
from retrograd.update_rules.adam import Adam
from retrograd.update_rules.adamw import AdamW
from retrograd.update_rules.aggregated_momentum import AggregatedMomentum
from retrograd.update_rules.complex_adam import ComplexAdam
from retrograd.update_rules.complex_momentum import ComplexMomentum
from retrograd.update_rules.lookahead import Lookahead
from retrograd.update_rules.optimistic import OptimisticAdam, OptimisticGradient
from retrograd.update_rules.rmsprop import RMSprop
from retrograd.update_rules.rule import Hyper, TorchRule, TorchTwin, UpdateRule
from retrograd.update_rules.sgd import SGD
from retrograd.update_rules.torch_options import OWN_RULE, name_of

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AggregatedMomentum",
    "ComplexAdam",
    "ComplexMomentum",
    "Hyper",
    "Lookahead",
    "OptimisticAdam",
    "OptimisticGradient",
    "RMSprop",
    "TorchRule",
    "TorchTwin",
    "UpdateRule",
    "rule_named",
    "rule_of",
]

_TWINS: tuple[type[TorchTwin], ...] = (SGD, Adam, AdamW, RMSprop)
_RULES: tuple[type[TorchRule], ...] = (
    *_TWINS,
    ComplexMomentum,
    AggregatedMomentum,
    ComplexAdam,
    OptimisticGradient,
    OptimisticAdam,
    Lookahead,
)


def rule_of(optimizer: torch.optim.Optimizer) -> TorchRule:
    """Return the update rule that equals an optimizer.

    Args:
        optimizer: An optimizer whose very class defines ``update_rule()``, as those of ``retrograd.optim`` do, or one of
            ``torch.optim``. Its class has to be one of the supported, not a subclass: that may do anything.

    Returns:
        The rule, with the optimizer's structural options.

    Raises:
        UnknownOptimizer: No rule equals this class with these options.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> rule_of(torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True))
    SGD(momentum=True, nesterov=True, maximize=False)
    """
    if "update_rule" in vars(type(optimizer)):
        return cast(Any, optimizer).update_rule()
    for rule in _TWINS:
        if type(optimizer) is rule.torch_optimizer:
            return rule.from_torch(optimizer)
    supported = ", ".join(f"torch.optim.{rule.torch_optimizer.__name__}" for rule in _TWINS)
    parents = [rule.torch_optimizer.__name__ for rule in _TWINS if isinstance(optimizer, rule.torch_optimizer)]
    parents += [kind.__name__ for kind in type(optimizer).__mro__[::-1] if "update_rule" in vars(kind)]
    # AdamW is a subclass of Adam in torch: the last parent is the closest one.
    note = f" It is a subclass of {parents[-1]}, which may change the step." if parents else ""
    raise UnknownOptimizer(
        f"No update rule equals {name_of(optimizer)}.{note} Supported: {supported}, those of retrograd.optim that have an "
        f"update rule, and a class with a method update_rule() of its own. {OWN_RULE}"
    )


def rule_named(name: str, options: Mapping[str, Any]) -> TorchRule:
    """Return the update rule of this class name with these structural options, as a run folder records them.

    Args:
        name: The class name.
        options: Its options as JSON holds them: lists for tuples, and for a rule within a rule its ``class`` and ``options``.

    Returns:
        The rule.

    Raises:
        UnknownOptimizer: The library has no such rule.

    >>> rule_named("SGD", {"momentum": True, "nesterov": False, "maximize": False})
    SGD(momentum=True, nesterov=False, maximize=False)
    >>> rule_named("Lookahead", {"rule": {"class": "AggregatedMomentum", "options": {"dampings": [0.0, 0.9]}}})
    Lookahead(rule=AggregatedMomentum(dampings=(0.0, 0.9), maximize=False))
    """
    for rule in _RULES:
        if rule.__name__ == name:
            return rule(**{option: _option(value) for option, value in options.items()})
    known = ", ".join(rule.__name__ for rule in _RULES)
    raise UnknownOptimizer(f"The record was made with the update rule {name}, which is none of {known}. {OWN_RULE}")


def _option(value: Any) -> Any:
    if isinstance(value, Mapping):
        return rule_named(value["class"], value["options"])
    return tuple(value) if isinstance(value, list) else value
