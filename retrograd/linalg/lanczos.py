"""Functions and extreme eigenvalues of a symmetric operator, from its Krylov spaces.

    V A Vᵀ = T,  V Vᵀ = I        f(A) v ≈ ‖v‖ Vᵀ f(T) e₁

v          a start vector, a row of [query, P]; each has its own Krylov space span(v, Av, A²v, …);
V, T       orthonormal rows that span it, [steps, P], the first of them along v, and A seen from there, a tridiagonal matrix;
f(T)       by the eigendecomposition of T; its eigenvalues are called Ritz values.

One tridiagonalisation serves any number of functions: exponential, inverse, filter.

Assumptions: A is symmetric. f(A) v is exact for polynomials of degree below ``steps``, and for every f once the Krylov space is
exhausted, which ends that row; else the error is at most 2‖v‖ times that of the best such polynomial between the extreme
eigenvalues. f is evaluated at Ritz values only, and they lie between those two.
Cost: one product a step. Each vector is orthogonalised twice against all before it, as otherwise rounding brings eigenvalues
in several copies: 4 · steps² · P operations and a memory of steps · P numbers a row.

References: Lanczos (1950), "An iteration method for the solution of the eigenvalue problem"; Saad (1992), "Analysis of some
Krylov subspace approximations to the matrix exponential operator"; Parlett (1980), "The symmetric eigenvalue problem".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrograd.errors import InputError
from retrograd.linalg.orthonormal import ROUNDING, finite_norms, normalise, remove
from retrograd.progress import track

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Krylov:
    """A symmetric operator, seen from the Krylov space of each of several start vectors.

    Attributes:
        basis: V, orthonormal rows for each start vector; zeros beyond the dimension of its space.
        diagonal: of T.
        off_diagonal: of T, not negative.
        norms: ‖v‖ of the start vectors.
        dimensions: of the Krylov spaces: less than ``steps`` where the space is exhausted.
    """

    basis: Float[Tensor, "query steps P"]
    diagonal: Float[Tensor, "query steps"]
    off_diagonal: Float[Tensor, "query steps-1"]
    norms: Float[Tensor, " query"]
    dimensions: Int[Tensor, " query"]

    def apply(self, function: Function) -> Float[Tensor, "query P"]:
        """Return f(A) v for every start vector v.

        Args:
            function: f, elementwise on a float64 tensor ``[query, steps]`` in main memory.
        """
        values, vectors = self.ritz()
        shares = vectors[:, 0]
        # Where v has no share in a Ritz vector f does not count, even if it is infinite there.
        weights = torch.where(shares == 0, 0.0, function(values) * shares)
        coefficients = torch.einsum("qsr,qr->qs", vectors, weights).to(self.basis) * self.norms[:, None]
        return torch.einsum("qsp,qs->qp", self.basis, coefficients)

    def ritz(self) -> tuple[Float[Tensor, "query steps"], Float[Tensor, "query steps steps"]]:
        """Return the eigenvalues of T, ascending, and its eigenvectors as columns, in float64 and main memory.

        Beyond the dimension of a row's space there are none: its first value is repeated, and the columns are 0.
        """
        diagonal, off_diagonal = (part.to("cpu", torch.float64) for part in (self.diagonal, self.off_diagonal))
        present = torch.arange(diagonal.shape[1]) < self.dimensions.cpu()[:, None]
        # What is missing becomes a value above all others, so that it sorts last and no eigenvector mixes it with them.
        bound = diagonal.abs().amax(dim=1) + 2 * off_diagonal.sum(dim=1)
        above = torch.where(bound > 0, 2 * bound, 1.0)[:, None]
        tridiagonal = torch.where(present, diagonal, above).diag_embed()
        tridiagonal = tridiagonal + off_diagonal.diag_embed(1) + off_diagonal.diag_embed(-1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return torch.where(present, values, values[:, :1]), vectors * present[:, None]


def lanczos(multiply: Callable[[Tensor], Tensor], start: Float[Tensor, "query P"], steps: int) -> Krylov:
    """Build the Krylov spaces of a symmetric A.

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        start: the start vectors v.
        steps: the dimension to reach; more than P are taken for P.

    Raises:
        InputError: ``steps`` is not positive.
        NonFinite: a start vector or a product is not finite.

    >>> space = lanczos(lambda rows: rows * torch.tensor([1.0, 4.0]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]), steps=2)
    >>> space.dimensions.tolist(), space.apply(torch.sqrt)
    ([2, 1], tensor([[1.0000, 2.0000],
                     [0.0000, 6.0000]]))
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}.")
    (count, size), small = start.shape, ROUNDING * torch.finfo(start.dtype).eps
    steps = min(steps, size)
    vectors, norms = normalise(start)
    alive, scale = norms > 0, torch.zeros_like(norms)
    basis, diagonal = start.new_zeros(count, steps, size), start.new_zeros(count, steps)
    off_diagonal, dimensions = torch.zeros_like(diagonal), torch.zeros_like(norms, dtype=torch.int64)
    for step in track(range(steps), "Lanczos"):
        if not alive.any():
            break
        basis[:, step] = vectors
        dimensions += alive
        rest, removed = remove(basis[:, : step + 1], multiply(vectors))
        length = finite_norms(rest)
        diagonal[:, step] = removed[:, step]
        # Relative to T so far. An end that is missed does no harm: the rest hangs on by a number the size of rounding.
        scale = torch.maximum(scale, removed[:, step].abs() + length)
        alive = alive & (length > small * scale)
        off_diagonal[:, step] = torch.where(alive, length, 0.0)
        vectors = torch.where(alive[:, None], rest / torch.where(alive, length, 1.0)[:, None], 0.0)
    # The last number leads to a vector that is not in the basis.
    return Krylov(basis, diagonal, off_diagonal[:, : steps - 1], norms, dimensions)


def apply_function(
    multiply: Callable[[Tensor], Tensor], vectors: Float[Tensor, "query P"], function: Function, steps: int
) -> Float[Tensor, "query P"]:
    """Return f(A) v for a symmetric A. For several functions call `lanczos` once, and ``apply`` of what it returns.

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        vectors: the rows v.
        function: f, elementwise on a float64 tensor in main memory.
        steps: products with A.

    Raises:
        InputError: ``steps`` is not positive.
        NonFinite: a vector or a product is not finite.

    >>> apply_function(lambda rows: rows * torch.tensor([0.0, 2.0]), torch.ones(1, 2), lambda s: torch.exp(-s), steps=2)
    tensor([[1.0000, 0.1353]])
    """
    return lanczos(multiply, vectors, steps).apply(function)


def eigenpairs(
    multiply: Callable[[Tensor], Tensor], start: Float[Tensor, " P"], steps: int, count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "count P"]]:
    """Return the largest Ritz values of a symmetric A, descending, and their unit vectors; for the smallest give −A.

    The outermost converge first, to eigenvalues. Of a repeated eigenvalue one start vector sees one eigenvector.

    Args:
        multiply: multiplies every row of ``[1, P]`` by A.
        start: the start vector, best a random one.
        steps: products with A; some times ``count``.
        count: how many pairs.

    Raises:
        InputError: the Krylov space has fewer than ``count`` dimensions, or a number is not positive.
        NonFinite: the start vector or a product is not finite.

    >>> values, vectors = eigenpairs(lambda rows: rows * torch.tensor([1.0, 4.0, -9.0]), torch.ones(3), steps=3, count=1)
    >>> values.round(decimals=3), vectors.abs().round(decimals=3)
    (tensor([4.]), tensor([[0., 1., 0.]]))
    """
    space = lanczos(multiply, start[None], steps)
    dimension = int(space.dimensions)
    if not 1 <= count <= dimension:
        raise InputError(
            f"count must be between 1 and {dimension}, the dimension of this start vector's Krylov space, got {count}. "
            "Take more steps, or a random start vector."
        )
    values, vectors = (part[0].to(space.basis) for part in space.ritz())
    largest = slice(dimension - count, dimension)
    return values[largest].flip(0), (vectors[:, largest].T @ space.basis[0]).flip(0)
