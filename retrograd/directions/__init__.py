"""Where a step goes instead of along the gradient: directions made of the game gradient and its Jacobian, one method a file.

A direction takes the place of g in front of the update rule: it may look at the gradient elsewhere (extragradient) or at its
Jacobian products (all others). Elementwise methods (momentum, optimistic gradient) are update rules.
"""

from retrograd.directions.competitive import Competitive
from retrograd.directions.consensus import Consensus
from retrograd.directions.direction import Direction, Field
from retrograd.directions.extragradient import Extragradient
from retrograd.directions.opponents import LOLA, LookAhead, StableOpponentShaping
from retrograd.directions.symplectic import SymplecticAdjustment

__all__ = [
    "LOLA",
    "Competitive",
    "Consensus",
    "Direction",
    "Extragradient",
    "Field",
    "LookAhead",
    "StableOpponentShaping",
    "SymplecticAdjustment",
]
