"""Optimizers around another optimizer, which keeps all the book.

Parameter groups, state, hooks and defaults are those of the wrapped optimizer, not copies: a scheduler, a checkpoint or a
recorder may be given either. Hooks fire when the wrapped optimizer steps, once for each step, with the state from before it;
what is registered on the wrapper is registered there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from retrograd.errors import InputError


class WrappingOptimizer(torch.optim.Optimizer, ABC):
    """What optimizers around another one share.

    Args:
        optimizer: The wrapped one, with its parameters.

    Raises:
        InputError: ``optimizer`` is not an optimizer.
    """

    optimizer: torch.optim.Optimizer
    _own: ClassVar[tuple[str, ...]] = ("optimizer",)
    """Attributes of the wrapper itself, those that a copy of it has."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        # torch's __init__ is not called: it would open a second book, and have hooks fire twice.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"{type(self).__name__} goes around an optimizer that has its parameters, such as "
                f"{type(self).__name__}(torch.optim.SGD(model.parameters(), lr=0.1)); got {optimizer!r}."
            )
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        """Look up what the wrapper does not have in the wrapped optimizer: ``param_groups``, ``state``, hooks."""
        if name == "optimizer":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return {name: vars(self)[name] for name in self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        vars(self).update(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer, and with it what this wrapper keeps there."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, or the wrapped optimizer's own."""
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register with the wrapped optimizer, which calls it with itself."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    @abstractmethod
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step."""
