"""Optimizers as pure functions, one a file, and which of them a ``torch.optim`` optimizer is."""

from collections.abc import Mapping
from typing import Any

import torch

from retrograd.errors import UnknownOptimizer
from retrograd.update_rules.adam import Adam
from retrograd.update_rules.adamw import AdamW
from retrograd.update_rules.rmsprop import RMSprop
from retrograd.update_rules.rule import Hyper, TorchRule, UpdateRule
from retrograd.update_rules.sgd import SGD
from retrograd.update_rules.torch_options import OWN_RULE, name_of

__all__ = ["SGD", "Adam", "AdamW", "Hyper", "RMSprop", "TorchRule", "UpdateRule", "rule_named", "rule_of"]

_RULES: tuple[type[TorchRule], ...] = (SGD, Adam, AdamW, RMSprop)


def rule_of(optimizer: torch.optim.Optimizer) -> TorchRule:
    """Return the update rule that equals an optimizer.

    Args:
        optimizer: A ``torch.optim`` optimizer. Its class has to be one of the supported, not a subclass.

    Returns:
        The rule, with the optimizer's structural options.

    Raises:
        UnknownOptimizer: No rule equals this class with these options.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> rule_of(torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True))
    SGD(momentum=True, nesterov=True, maximize=False)
    """
    for rule in _RULES:
        if type(optimizer) is rule.torch_optimizer:
            return rule.from_torch(optimizer)
    supported = ", ".join(f"torch.optim.{rule.torch_optimizer.__name__}" for rule in _RULES)
    parents = [rule.torch_optimizer.__name__ for rule in _RULES if isinstance(optimizer, rule.torch_optimizer)]
    # AdamW is a subclass of Adam in torch: the last parent is the closest one.
    note = f" It is a subclass of {parents[-1]}, which may change the step." if parents else ""
    raise UnknownOptimizer(f"No update rule equals {name_of(optimizer)}.{note} Supported: {supported}. {OWN_RULE}")


def rule_named(name: str, options: Mapping[str, Any]) -> TorchRule:
    """Return the update rule of this class name with these structural options, as a run folder records them.

    Raises:
        UnknownOptimizer: The library has no such rule.

    >>> rule_named("SGD", {"momentum": True, "nesterov": False, "maximize": False})
    SGD(momentum=True, nesterov=False, maximize=False)
    """
    for rule in _RULES:
        if rule.__name__ == name:
            return rule(**options)
    known = ", ".join(rule.__name__ for rule in _RULES)
    raise UnknownOptimizer(f"The record was made with the update rule {name}, which is none of {known}. {OWN_RULE}")
