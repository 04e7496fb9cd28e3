"""What an optimizer is to retrograd: a pure function, elementwise in the coordinates of one parameter.

    (θ', o') = U(θ, o, g, h)

θ    a parameter, any shape, in the parameter's unit
o    its slots, name → tensor shaped like θ ("velocity", "first_moment", …)
g    the gradient handed to the optimizer (after clipping, before weight decay), unit of loss per unit of θ
h    numeric hyperparameters at this step, by whole-word name: a schedule may change them at each step

Structural options (is there a velocity? is it Nesterov's?) decide which slots there are and which formula holds, and are fields
of the rule. Numbers are in ``h``, because they are inputs of a step that one may differentiate by.

Assumes that each coordinate's update sees only that coordinate. A rule that mixes coordinates (Muon, Shampoo, LARS) is not an
``UpdateRule``. Clipping by global norm mixes them, too, and is the business of the update map.

Two zeros in ``h`` have a meaning. Absent keys that a rule documents as optional are 0. And where a plain number 0 turns a
term off, ``torch.optim`` skips that term instead of adding nothing, and so do the rules: see ``arithmetic.is_zero``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

Hyper = Mapping[str, float | Tensor]
"""Hyperparameters of one parameter group at one step: floats, or 0-dimensional tensors to differentiate by them."""


@runtime_checkable
class UpdateRule(Protocol):
    """One optimizer as a pure, elementwise and differentiable function.

    >>> class SignDescent:
    ...     slots = ()
    ...     def apply(self, parameter, slots, gradient, hyper, /):
    ...         return parameter - hyper["learning_rate"] * gradient.sign(), {}
    ...     def step_size(self, slots, hyper, /):
    ...         return 0.0
    >>> isinstance(SignDescent(), UpdateRule)
    True
    """

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that each parameter has. All start at zero."""
        ...

    def apply(
        self, parameter: Tensor, slots: dict[str, Tensor], gradient: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the parameter and its slots after one step; nothing is changed in place.

        Args:
            parameter: θ, any shape; leading batch axes are welcome as everything is elementwise.
            slots: o, one tensor of θ's shape for each name in ``self.slots``.
            gradient: g, shaped like θ.
            hyper: h.

        Returns:
            (θ', o'), differentiable with respect to θ, o, g and those values of h that are tensors.
        """
        ...

    def step_size(self, slots: dict[str, Tensor], hyper: Hyper, /) -> Tensor | float:
        """Return the long-run −dθ/dg of one gradient: once the slots have passed all of it on, preconditioner frozen.

        Args:
            slots: o *after* the step that took the gradient: its preconditioner is the one that the gradient met.
            hyper: h of that step.

        Returns:
            Elementwise (or one number for all), in units of θ² per unit of loss. Not negative, except that every value
            changes sign with ``maximize``, where the parameter moves along the gradient.
        """
        ...


@runtime_checkable
class TorchRule(UpdateRule, Protocol):
    """An update rule that can be read off an optimizer while it trains, as recording needs it.

    Which rule an optimizer has is found in one of two ways (see ``rule_of``). The classes of ``torch.optim`` know nothing of
    rules, so a `TorchTwin` names the class that it equals. An optimizer of one's own says it itself: a method
    ``update_rule()``, defined by its very class, returns its rule. That way the optimizers of ``retrograd.optim``, which are
    built on these rules, are found without being imported here, and so is anybody else's.
    """

    @property
    def torch_slots(self) -> Mapping[str, str]:
        """Slot name → its key in ``optimizer.state[parameter]``. A key that is absent, or holds None, stands for zeros."""
        ...

    def hyper_from_torch(self, group: dict[str, Any], state: dict[str, Any], /) -> dict[str, float]:
        """Return h of the *coming* step.

        Args:
            group: The parameter group.
            state: ``optimizer.state[parameter]`` of one parameter of it before ``optimizer.step()``; may be empty.

        Returns:
            All hyperparameters of the rule, as floats.
        """
        ...


@runtime_checkable
class TorchTwin(TorchRule, Protocol):
    """An update rule that equals a class of ``torch.optim``."""

    torch_optimizer: ClassVar[type[torch.optim.Optimizer]]
    """The class that the rule equals. Exactly this one: a subclass is a different optimizer."""

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, /) -> "TorchTwin":
        """Return the rule with the structural options of ``optimizer``, or raise ``UnknownOptimizer``."""
        ...
