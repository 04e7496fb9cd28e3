"""Competitive gradient descent: the step at which players best answer each other's step, to first order.

    d = (I + η H_o)⁻¹ v                                              (Schäfer & Anandkumar 2019, eq. 3)

Symbols: v game gradient [loss/w] · H_o its Jacobian without the diagonal blocks [loss/w²] · η the rate that both players are
taken to step with [w²/loss].

In two-player zero-sum games H_o is antisymmetric and I + ηH_o always invertible: no step is too long for the rotation.
Elsewhere it may be singular at large η.

With few parameters the system is written out and solved: as many products as there are parameters. Else it is left to
conjugate gradients on the normal equations, whose condition number is at most 1 + η²‖H_o‖² in zero-sum games: two products an
iteration and player. The iterations are part of the step and are differentiated with it.

Reference: Schäfer & Anandkumar, "Competitive gradient descent", NeurIPS 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.directions.direction import Field, add, others_product, others_transposed_product, scaled
from retrograd.errors import InputError
from retrograd.params import Params, count, flatten, inner, unflatten, zeros_like

DENSE = 2000  # parameters


@dataclass(frozen=True)
class Competitive:
    """The step of the bilinear game that the players see.

    Args:
        rate: η.
        iterations: of conjugate gradients; None to solve the system directly, with up to 2,000 parameters.
        tolerance: the residual, as a share of v, at which the iterations end in effect.

    Raises:
        InputError: there are too many parameters to solve the system directly.
    """

    rate: float
    iterations: int | None = None
    tolerance: float = 1e-10

    def __call__(
        self, field: Field, params: Params, buffers: Params, rates: Mapping[str, float | Tensor]
    ) -> tuple[Params, Params]:
        """Return (I + η H_o)⁻¹ v."""
        here, after = field(params, buffers)
        if self.iterations is None:
            return self._solved(field, params, buffers, here), after

        def operator(vector: Params) -> Params:
            return add(vector, others_product(field, params, buffers, vector), self.rate)

        def transposed(vector: Params) -> Params:
            return add(vector, others_transposed_product(field, params, buffers, vector), self.rate)

        solution, residual = zeros_like(here), here
        gradient = transposed(residual)
        direction, squared = gradient, inner(gradient, gradient)
        floor = self.tolerance**2 * squared
        for _ in range(self.iterations):
            # Once solved, every length is 0: nothing moves any more, and no 0/0 spoils a derivative.
            going = squared > floor
            moved = operator(direction)
            length = torch.where(going, squared / torch.where(going, inner(moved, moved), torch.ones_like(squared)), 0.0)
            solution, residual = add(solution, direction, length), add(residual, moved, -length)
            gradient = transposed(residual)
            new = inner(gradient, gradient)
            share = torch.where(going, new / torch.where(going, squared, torch.ones_like(squared)), 0.0)
            direction, squared = add(gradient, scaled(direction, share)), torch.where(going, new, squared)
        return solution, after

    def _solved(self, field: Field, params: Params, buffers: Params, here: Params) -> Params:
        if count(here) > DENSE:
            raise InputError(
                f"a system of {count(here)} parameters is too large to be written out (at most {DENSE}): give "
                "Competitive(rate, iterations=20), say."
            )
        unit = unflatten(torch.eye(count(here), dtype=next(iter(here.values())).dtype), here)
        columns = torch.func.vmap(lambda vector: others_product(field, params, buffers, vector), randomness="same")(unit)
        matrix = flatten(unit.values(), batched=True) + self.rate * flatten(columns.values(), batched=True).T
        # Not torch.linalg.solve: torch 2.13 pushes tangents of a batch of systems through it wrongly.
        return unflatten(torch.linalg.inv(matrix) @ flatten(here.values()), here)
