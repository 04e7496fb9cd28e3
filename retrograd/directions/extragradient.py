"""Extragradient: the gradient at the point where a plain step would lead.

    d = v(w − η v(w))                                       (Korpelevich 1976)

Symbols: v game gradient [loss/w] · η rate of the look ahead [w²/loss], the step's own learning rate unless given.

Converges where plain simultaneous steps turn in circles (bilinear games: modulus √3/2 at η = 1/√2 of the frequency). Both
evaluations see the same batch and the same random numbers, as noise keeps it from converging else (Mishchenko et al. 2020).
With momentum, Adam or another rule behind it, that rule takes d for the gradient; the look ahead itself is a plain step.
Buffers (batch norm) are moved by both evaluations.

Cost: two gradients. References: Korpelevich, "The extragradient method for finding saddle points and other problems", 1976;
Gidel et al., "A variational inequality perspective on generative adversarial networks", ICLR 2019; Mishchenko et al.,
"Revisiting stochastic extragradient", AISTATS 2020.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from retrograd.directions.direction import Field, add
from retrograd.params import Params


@dataclass(frozen=True)
class Extragradient:
    """The gradient at a point ahead.

    Args:
        rate: η; None for the learning rate of each parameter.
    """

    rate: float | None = None

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return v(w − η v(w))."""
        here, buffers = field(params, buffers)
        ahead = {name: (rates[name] if self.rate is None else self.rate) * leaf for name, leaf in here.items()}
        return field(add(params, ahead, -1.0), buffers)
