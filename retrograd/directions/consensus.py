"""Consensus optimization: the gradient, and some way down the slope of its squared length.

    d = v + γ Jᵀ v,        Jᵀ v = ∇ ½‖v‖²                    (Mescheder, Nowozin & Geiger 2017, eq. 8)

Symbols: v game gradient [loss/w] · J its Jacobian [loss/w²] · γ weight [w²/loss].

Draws in towards every stationary point, minima, saddles and maxima alike: too large a γ makes bad ones attract. Cost: one
gradient and one more pass back, about three gradients in all.

Reference: Mescheder, Nowozin & Geiger, "The numerics of GANs", NeurIPS 2017.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from retrograd.directions.direction import Field, add, transposed_product
from retrograd.params import Params


@dataclass(frozen=True)
class Consensus:
    """The gradient and its squared length's.

    Args:
        weight: γ.
    """

    weight: float

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return v + γ Jᵀ v."""
        here, after = field(params, buffers)
        return add(here, transposed_product(field, params, buffers, here), self.weight), after
