"""Reading structural options off the parameter groups of a ``torch.optim`` optimizer."""

from collections.abc import Mapping

import torch

from retrograd.errors import UnknownOptimizer

OWN_RULE = "Pass rule= with an UpdateRule of your own, or file an issue."


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the full class name, such as ``torch.optim.sgd.SGD``."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def check_options(optimizer: torch.optim.Optimizer, required: Mapping[str, tuple[bool, str]]) -> None:
    """Raise unless every group has each option at the one value that a rule allows.

    Args:
        optimizer: The optimizer.
        required: Option → (the value it has to have, what to do otherwise). A group without the option has that value, for
            older versions of torch lack the newer options.

    Raises:
        UnknownOptimizer: An option has another value, or a parameter is complex.
    """
    for index, group in enumerate(optimizer.param_groups):
        for option, (value, advice) in required.items():
            if bool(group.get(option, value)) != value:
                raise UnknownOptimizer(
                    f"{name_of(optimizer)} with {option}={group[option]} (parameter group {index}) has no update rule; "
                    f"allowed is {option}={value}. {advice} {OWN_RULE}"
                )
        if any(parameter.is_complex() for parameter in group["params"]):
            raise UnknownOptimizer(
                f"{name_of(optimizer)} trains a complex parameter (parameter group {index}); update rules are for real ones. "
                f"Train its torch.view_as_real. {OWN_RULE}"
            )


def agreed_option(optimizer: torch.optim.Optimizer, option: str, where: str | None = None) -> bool:
    """Return the value of an option that all groups must share, as one rule holds for all parameters.

    Args:
        optimizer: The optimizer.
        option: Its name.
        where: Ask only groups in which this number is not 0; without such groups the value is False.

    Returns:
        The value.

    Raises:
        UnknownOptimizer: Groups differ.
    """
    values = [bool(group[option]) for group in optimizer.param_groups if where is None or group[where] != 0]
    if len(set(values)) > 1:
        raise UnknownOptimizer(
            f"{name_of(optimizer)} has {option}={values} in its parameter groups; allowed is one value for all of them. "
            f"Use two optimizers. {OWN_RULE}"
        )
    return bool(values) and values[0]


def any_nonzero(optimizer: torch.optim.Optimizer, number: str) -> bool:
    """Return whether a number differs from 0 in some group, so that the slots it needs must be there."""
    return any(group[number] != 0 for group in optimizer.param_groups)


DIFFERENTIABLE = {"differentiable": (False, "retrograd differentiates the step itself; leave the option off.")}
"""``differentiable=True`` keeps torch's own graph through the step: two owners of one graph."""
