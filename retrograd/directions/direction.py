"""What a direction is: a function of a field and of the point, and the products of the field's Jacobian that it may use.

    v(w) = (∂L_i/∂w_i)_i        the field: the gradient of each player that moves, by its own parameters
    J = ∂v/∂w                    [to, from]; its diagonal blocks are the players' Hessians
    H_o                          J with the diagonal blocks set to 0: what players do to each other's slopes

All products are made by `torch.func`, so that a direction can be differentiated again, forward and backward. Only parameters of
players that move in this step count; the others' are constants. With one player v is the plain gradient and H_o is 0.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from retrograd.params import Params, map_params, zeros_like


@runtime_checkable
class Field(Protocol):
    """The game gradient of one step."""

    @property
    def players(self) -> Mapping[str, tuple[str, ...]]:
        """Who moves, and the names of their parameters."""
        ...

    def __call__(self, params: Params, buffers: Params, /) -> tuple[Params, Params]:
        """Return v of the parameters that move, and the buffers as this evaluation leaves them."""
        ...

    def loss(self, player: str, params: Params, buffers: Params, /) -> Tensor:
        """Return L of one player, a scalar."""
        ...


@runtime_checkable
class Direction(Protocol):
    """What takes the place of the gradient."""

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor], /
    ) -> tuple[Params, Params]:
        """Return the direction and the buffers after the step.

        Args:
            field: v, to be evaluated anywhere.
            params: all parameters w.
            buffers: the buffers before the step.
            rates: the learning rate of each parameter in this step.
        """
        ...


def add(params: Params, vector: Params, scale: float | Tensor = 1.0) -> Params:
    """Return params + scale · vector; parameters that the vector lacks stay as they are."""
    return {name: leaf + scale * vector[name] if name in vector else leaf for name, leaf in params.items()}


def product(field: Field, params: Params, buffers: Params, vector: Params) -> Params:
    """Return J · vector."""
    own = {name: params[name] for name in vector}
    return torch.func.jvp(lambda moved: field({**params, **moved}, buffers)[0], (own,), (vector,))[1]


def transposed_product(field: Field, params: Params, buffers: Params, vector: Params) -> Params:
    """Return Jᵀ · vector."""
    own = {name: params[name] for name in vector}
    return torch.func.vjp(lambda moved: field({**params, **moved}, buffers)[0], own)[1](vector)[0]


def others_product(field: Field, params: Params, buffers: Params, vector: Params) -> Params:
    """Return H_o · vector: how each player's slope changes when all others move along the vector."""
    found: Params = {}
    for names in field.players.values():
        rest = {name: torch.zeros_like(leaf) if name in names else leaf for name, leaf in vector.items()}
        moved = product(field, params, buffers, rest)
        found |= {name: moved[name] for name in names}
    return {name: found[name] for name in vector}


def others_transposed_product(field: Field, params: Params, buffers: Params, vector: Params) -> Params:
    """Return H_oᵀ · vector."""
    total = zeros_like(vector)
    for names in field.players.values():
        one = {name: leaf if name in names else torch.zeros_like(leaf) for name, leaf in vector.items()}
        moved = transposed_product(field, params, buffers, one)
        total = {name: leaf if name in names else leaf + moved[name] for name, leaf in total.items()}
    return total


def scaled(vector: Params, scale: float | Tensor) -> Params:
    """Return scale · vector."""
    return map_params(lambda leaf: scale * leaf, vector)
