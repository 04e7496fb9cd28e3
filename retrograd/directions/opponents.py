"""Players who reckon with the others' next step: LookAhead, LOLA, and the stable mixture of both.

    LookAhead   d = ξ₀ = (I − η H_o) v                                        (Zhang & Lesser 2010)
    LOLA        d = ξ₀ − η χ,    χ_i = Σ_{j≠i} (∂²L_j/∂w_i∂w_j) ∂L_i/∂w_j     (Foerster et al. 2018, first order)
    SOS         d = ξ₀ − p η χ,  p = min(p₁, p₂)                              (Letcher et al. 2019)
                p₁ = 1 if ⟨−ηχ, ξ₀⟩ ≥ 0, else min(1, −a ‖ξ₀‖² / ⟨−ηχ, ξ₀⟩)
                p₂ = ‖v‖² if ‖v‖ < b, else 1

Symbols: v game gradient, v_i = ∂L_i/∂w_i [loss/w] · H_o the Jacobian of v without its diagonal blocks [loss/w²] · η the rate at
which opponents are taken to learn [w²/loss] · a, b in (0, 1).

(I − ηH_o) v is what my slope becomes once the others have made their step; −ηχ is what I gain by shaping that step. LOLA moves
stable fixed points elsewhere; p in SOS switches shaping off near them and never lets it turn the step back. p is a function of
the point, and is differentiated with it (one-sidedly where branches meet).

Cost, with n players: n products for LookAhead, and 2n gradients more for the others. References: Zhang & Lesser, "Multi-agent
learning with policy prediction", AAAI 2010; Foerster et al., "Learning with opponent-learning awareness", AAMAS 2018; Letcher
et al., "Stable opponent shaping in differentiable games", ICLR 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.directions.direction import Field, add, others_product, scaled, transposed_product
from retrograd.params import Params, inner


@dataclass(frozen=True)
class LookAhead:
    """The gradient after the others' step, without shaping it.

    Args:
        rate: η.
    """

    rate: float

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return (I − η H_o) v."""
        return _looked_ahead(field, params, buffers, self.rate)[1:]


@dataclass(frozen=True)
class LOLA:
    """Learning with opponent-learning awareness.

    Args:
        rate: η.
    """

    rate: float

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return (I − η H_o) v − η χ."""
        _, ahead, after = _looked_ahead(field, params, buffers, self.rate)
        return add(ahead, shaping(field, params, buffers), -self.rate), after


@dataclass(frozen=True)
class StableOpponentShaping:
    """LOLA as far as it does no harm.

    Args:
        rate: η.
        a: how much of the step shaping may take back, between 0 and 1.
        b: length of the gradient below which shaping fades.
    """

    rate: float
    a: float = 0.5
    b: float = 0.1

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return (I − η H_o) v − p η χ."""
        here, ahead, after = _looked_ahead(field, params, buffers, self.rate)
        shaped = scaled(shaping(field, params, buffers), -self.rate)
        along = inner(shaped, ahead)
        against = torch.where(along < 0, along, -torch.ones_like(along))  # a safe number where there is no conflict
        one = torch.ones_like(along)
        first = torch.where(along < 0, torch.minimum(one, -self.a * inner(ahead, ahead) / against), one)
        squared = inner(here, here)
        second = torch.where(squared < self.b**2, squared, one)
        return add(ahead, shaped, torch.minimum(first, second)), after


def _looked_ahead(field: Field, params: Params, buffers: Params, rate: float) -> tuple[Params, Params, Params]:
    """Return v, (I − η H_o) v, and the buffers after evaluating v."""
    here, after = field(params, buffers)
    return here, add(here, others_product(field, params, buffers, here), -rate), after


def shaping(field: Field, params: Params, buffers: Params) -> Params:
    """Return χ."""
    found: Params = {}
    everybody = [name for names in field.players.values() for name in names]
    for player, names in field.players.items():
        others = {name: params[name] for name in everybody if name not in names}
        own = {name: torch.zeros_like(params[name]) for name in names}
        gains = torch.func.grad(lambda moved, player=player: field.loss(player, {**params, **moved}, buffers))(others)
        together = {**own, **gains}
        back = transposed_product(field, params, buffers, {name: together[name] for name in everybody})
        found |= {name: back[name] for name in names}
    return found
