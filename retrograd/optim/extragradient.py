"""Extragradient: look where a step would lead, and step with the gradient of there.

    w̃  = w − r g(w; ξ)                                                     extrapolation
    w' = U(w, g(w̃; ξ))                                                     update, from w                   (Korpelevich 1976)

Symbols: w all parameters of all players · g their gradients, each of its own loss [loss/w] · r ``rate`` of extrapolation
[w²/loss] · U the wrapped optimizer, for SGD w − η g(w̃) · ξ the sample: batch and random numbers, *the same twice*.

Why: near an equilibrium with imaginary eigenvalues gradients turn the iterates outward, and the gradient of w̃ points back in.
For J = dg/dw with eigenvalue i s and SGD with r = η, |1 − iηs − (ηs)²| < 1 if ηs < 1, at best √¾ at ηs = √½. With the sample
kept the same it is, approximately, one implicit step on that sample, and stays stable under noise; with fresh samples the two
noises do not cancel, and it may leave even a bilinear game (Mishchenko et al. 2020). Gidel et al. (2019) brought it, with Adam
for U, to adversarial networks.

Assumes that the closure does the same each time but for the parameters. torch's random numbers (CPU, and accelerators that
hold parameters) are put back in between; those of ``random`` and numpy are not. Buffers that a forward pass writes, as batch
normalisation's, are written twice. The extrapolation takes the plain gradient: weight decay and preconditioner of U are not in
it.

Cost: two forward and backward passes a step, one copy of the parameters. References: Korpelevich, "The extragradient method for
finding saddle points and other problems", 1976; Gidel, Berard, Vignoud, Vincent & Lacoste-Julien, "A variational inequality
perspective on generative adversarial networks", ICLR 2019; Mishchenko, Kovalev, Shulgin, Richtárik & Malitsky, "Revisiting
stochastic extragradient", AISTATS 2020.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from retrograd.directions import Extragradient
from retrograd.errors import InputError
from retrograd.optim.wrapper import WrappingOptimizer
from retrograd.update_rules import TorchRule, rule_of


class ExtraGradient(WrappingOptimizer):
    """Extragradient around any optimizer whose step takes no closure of its own.

    A parameter whose gradient is None, such as a frozen one or that of a player who does not move, is neither extrapolated nor
    stepped. What is left in ``grad`` is the gradient of w̃.

    Args:
        optimizer: U, over the parameters of all players that move together.
        rate: r; None takes the learning rate of each parameter group, as it is in that step.

    Raises:
        InputError: ``optimizer`` is not one, or would need the closure itself, or ``rate`` is not positive and finite.

    On x y, from (1, 1) with η = ½: w̃ = (½, 3/2), and the step from (1, 1) with the gradient (3/2, −½) of there is (¼, 5/4).

    >>> point = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = ExtraGradient(torch.optim.SGD([point], lr=0.5))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     x, y = point
    ...     (x * y.detach() - x.detach() * y).backward()
    >>> optimizer.step(closure)
    >>> point.detach()
    tensor([0.2500, 1.2500])
    """

    _own: ClassVar[tuple[str, ...]] = ("optimizer", "rate")
    citation: ClassVar[str] = """@article{korpelevich1976extragradient,
  title = {The extragradient method for finding saddle points and other problems},
  author = {Korpelevich, Galina M.},
  journal = {Matecon},
  volume = {12},
  year = {1976}
}
@inproceedings{gidel2019variational,
  title = {A Variational Inequality Perspective on Generative Adversarial Networks},
  author = {Gidel, Gauthier and Berard, Hugo and Vignoud, Ga\\"etan and Vincent, Pascal and Lacoste-Julien, Simon},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}
@inproceedings{mishchenko2020revisiting,
  title = {Revisiting Stochastic Extragradient},
  author = {Mishchenko, Konstantin and Kovalev, Dmitry and Shulgin, Egor and Richt\\'arik, Peter and Malitsky, Yura},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year = {2020}
}"""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float | None = None):
        super().__init__(optimizer)
        inner: Any = optimizer
        while isinstance(inner, WrappingOptimizer):
            if isinstance(inner, ExtraGradient):
                raise InputError("ExtraGradient cannot go around another ExtraGradient; use one of them.")
            inner = inner.optimizer
        if isinstance(inner, torch.optim.LBFGS):
            raise InputError("ExtraGradient cannot go around LBFGS, which evaluates the closure itself. Use SGD or Adam.")
        if rate is not None and not 0 < float(rate) < math.inf:
            raise InputError(f"rate must be positive and finite, or None for the learning rate of each group; got {rate}.")
        self.rate = rate

    def direction(self) -> Extragradient:
        """Return what takes the gradient's place, for a record of the run."""
        return Extragradient(self.rate)

    def update_rule(self) -> TorchRule:
        """Return the rule of the wrapped optimizer: U, which steps with the gradient of w̃ instead of that of w.

        Raises:
            UnknownOptimizer: No rule equals the wrapped optimizer.
        """
        return rule_of(self.optimizer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Extrapolate and step.

        Args:
            closure: Sets gradients to zero, evaluates the losses, calls ``backward`` and returns the loss. It is called twice.

        Returns:
            What the closure returned at w, before the step.

        Raises:
            InputError: There is no closure.
        """
        if closure is None:
            raise InputError(
                "ExtraGradient evaluates the gradient twice: call step(closure) with a function that does zero_grad, the "
                "forward pass and backward, and returns the loss."
            )
        with self._same_random_numbers(), torch.enable_grad():
            loss = closure()
        moving = [(group, leaf) for group in self.param_groups for leaf in group["params"] if leaf.grad is not None]
        before = [leaf.clone() for _, leaf in moving]
        try:
            for group, leaf in moving:
                rate = float(group["lr"] if self.rate is None else self.rate)
                leaf.add_(leaf.grad, alpha=rate if group.get("maximize") else -rate)
            with torch.enable_grad():
                closure()
        finally:
            for (_, leaf), old in zip(moving, before, strict=True):
                leaf.copy_(old)
        self.optimizer.step()
        return loss

    def _same_random_numbers(self) -> Any:
        """Put torch's generators back afterwards, so that the next evaluation draws the same and both draw as much as one."""
        devices = {leaf.device for group in self.param_groups for leaf in group["params"] if leaf.device.type != "cpu"}
        kinds = {device.type for device in devices}
        if not kinds or kinds == {"meta"}:
            return torch.random.fork_rng(devices=[])
        kind = sorted(kinds - {"meta"})[0]
        indices = [device.index or 0 for device in devices if device.type == kind]
        return torch.random.fork_rng(devices=indices, device_type=kind)
