"""The matrix of the damped system as a function of flat vectors, which is what iterative solvers take.

    A v = w G v + s v        A_B v = w G_B v + s v

G, G_B     curvature averaged over all examples, and over a mini-batch B of them: an unbiased estimate of it;
w, s       mean recorded weight of the examples; weight decay and damping (see `retrograd.adjoint.solvers.solver`).

The largest eigenvalue comes from 20 Lanczos steps (a few per cent below the true one at most, which a step of 1 over it
forgives: 2 over it is the limit), for mini-batches the largest of three of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.curvature import Operator, ProductOperator
from retrograd.linalg import eigenpairs
from retrograd.params import Params, flatten, unflatten

_LANCZOS_STEPS = 20
_BATCHES_TRIED = 3


@dataclass(frozen=True)
class Damped:
    """A = w G + s.

    Attributes:
        operator: G, with products.
        weight: w.
        shift: s.
    """

    operator: ProductOperator
    weight: float
    shift: float

    def __call__(self, rows: Float[Tensor, "query P"], ids: Tensor | None = None) -> Float[Tensor, "query P"]:
        """Return A v for every row, or A_B v for the examples ``ids``."""
        return self.weight * self.operator.rows(rows, ids) + self.shift * rows

    def flat(self, vectors: Params) -> Float[Tensor, "query P"]:
        """Return vectors as rows."""
        return flatten((vectors[name] for name in self.operator.like), batched=True)

    def named(self, rows: Float[Tensor, "query P"]) -> Params:
        """Return rows as vectors."""
        return unflatten(rows, self.operator.like)

    def inverse_of(self, operator: Operator, shift: float, power: float = 1.0) -> Callable[[Tensor], Tensor]:
        """Return the function that multiplies rows by (w P + shift)^(−power), for an approximation P of G."""

        def function(eigenvalues: Tensor, _: float) -> Tensor:
            return (self.weight * eigenvalues + shift) ** -power

        return lambda rows: self.flat(operator.apply(function, self.named(rows)))

    def mini_batches(self, size: int | None, count: int, seed: int) -> Callable[[int], Tensor | None]:
        """Return the function from an iteration to its examples; None, which stands for all, from ``count`` on.

        Every example once, in random order, then all once more, and so on. By id, so that the order of rows does not matter.
        """
        ids = self.operator.ids.sort().values
        if size is None or size >= len(ids):
            return lambda _: None
        generator, rounds = torch.Generator().manual_seed(seed), -(-count * size // len(ids))
        drawn = torch.cat([ids[torch.randperm(len(ids), generator=generator)] for _ in range(rounds)]).split(size)
        return lambda iteration: drawn[iteration] if iteration < count else None

    def largest(self, batch_of: Callable[[int], Tensor | None], root: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return the largest eigenvalue of R A R, for all examples or over a few mini-batches; R = 1 if not given."""
        like = next(iter(self.operator.like.values()))
        size = sum(leaf.numel() for leaf in self.operator.like.values())
        start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
        batches = [None] if batch_of(0) is None else [batch_of(number) for number in range(_BATCHES_TRIED)]

        around = root or (lambda rows: rows)

        def value(ids: Tensor | None) -> float:
            return eigenpairs(lambda rows: around(self(around(rows), ids)), start, _LANCZOS_STEPS, 1)[0].item()

        return max(value(ids) for ids in batches)
