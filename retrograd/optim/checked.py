"""What the optimizers of this package share: options that are checked whenever they come in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from retrograd.errors import InputError


class CheckedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that refuses options out of their range, in new groups as in restored ones."""

    @abstractmethod
    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless the options of a group are allowed."""

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a group with plain numbers for what the user may give as a complex one."""
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: ``"params"``, and options that differ from the defaults.

        Raises:
            InputError: An option is out of its range, or a parameter is complex.
        """
        group = self._plain(dict(param_group))
        self._check({**self.defaults, **group})
        super().add_param_group(group)
        if any(leaf.is_complex() for leaf in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise InputError("a parameter is complex; these optimizers are for real ones. Train its torch.view_as_real.")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` or a copy holds; options that are missing in it have their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            self._check(group)
