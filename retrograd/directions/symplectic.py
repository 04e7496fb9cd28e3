"""Symplectic gradient adjustment: the gradient, turned by the part of its Jacobian that makes it rotate.

    d = v + λ Aᵀ v,        A = (J − Jᵀ)/2,    Aᵀ v = (Jᵀ v − J v)/2           (Balduzzi et al. 2018)
    λ = weight · sign(⟨v, Jᵀv⟩ ⟨Aᵀv, Jᵀv⟩ / d + 0.1)  with alignment: towards stable and away from unstable points

Symbols: v game gradient [loss/w] · J its Jacobian [loss/w²] · d number of parameters, in λ.

In a game without rotation (A = 0) nothing changes; in a bilinear one d points at the equilibrium. Cost: one product with J and
one with its transpose, about five gradients in all. λ's sign is a constant to every derivative.

Reference: Balduzzi et al., "The mechanics of n-player differentiable games", ICML 2018; Letcher et al., "Differentiable game
mechanics", JMLR 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.directions.direction import Field, add, product, scaled, transposed_product
from retrograd.params import Params, count, inner


@dataclass(frozen=True)
class SymplecticAdjustment:
    """The gradient without its rotation.

    Args:
        weight: modulus of λ [w²/loss].
        align: whether the sign of λ is chosen at each point.
    """

    weight: float = 1.0
    align: bool = True

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return v + λ Aᵀ v."""
        here, after = field(params, buffers)
        back = transposed_product(field, params, buffers, here)
        turned = scaled(add(back, product(field, params, buffers, here), -1.0), 0.5)
        weight: float | Tensor = self.weight
        if self.align:
            weight = self.weight * torch.sign(inner(here, back) * inner(turned, back) / count(here) + 0.1)
        return add(here, turned, weight), after
