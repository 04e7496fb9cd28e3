"""Eigenvalues of largest modulus of an operator that need not be symmetric, from one Krylov space.

    A Vᵀ_k = Vᵀ_{k+1} H        V Vᵀ = I

V          orthonormal rows, k + 1 of them, the first along the start vector;
H          A seen from the Krylov space, [k + 1, k], zero below the first subdiagonal. The eigenvalues of its first k rows are
           the Ritz values.

Assumptions: none but a real A. Eigenvalues at the edge of the spectrum converge first; where A is far from normal, Ritz values
may be far from all eigenvalues, though never outside of the field of values. When the space is exhausted they are eigenvalues:
the matrices end there, with a last row of zeros in V and H, so that the equation still holds.
Cost: one product a step, 4 · steps² · P operations, memory steps · P.

References: Arnoldi (1951), "The principle of minimized iterations in the solution of the matrix eigenvalue problem"; Saad
(2011), "Numerical methods for large eigenvalue problems", chapter 6.
"""

from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.linalg.orthonormal import ROUNDING, finite_norms, normalise, remove
from retrograd.progress import track


def arnoldi(
    multiply: Callable[[Tensor], Tensor], start: Float[Tensor, " P"], steps: int
) -> tuple[Float[Tensor, "rows P"], Float[Tensor, "rows rank"]]:
    """Build the Krylov space of an operator A.

    Args:
        multiply: multiplies every row of ``[1, P]`` by A.
        start: the start vector.
        steps: the dimension k to reach; less if the space is exhausted before.

    Returns:
        V ``[k + 1, P]`` and H ``[k + 1, k]``.

    Raises:
        InputError: ``steps`` is not positive, or the start vector is 0.
        NonFinite: the start vector or a product is not finite.

    >>> turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    >>> basis, hessenberg = arnoldi(lambda rows: rows @ turn.T, torch.tensor([1.0, 0.0]), steps=5)
    >>> hessenberg.tolist()
    [[0.0, -2.0], [2.0, 0.0], [0.0, 0.0]]
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}.")
    vector, norm = normalise(start[None])
    if norm == 0:
        raise InputError("the start vector is 0, and so is its Krylov space. Give another, best a random one.")
    small, size = ROUNDING * torch.finfo(start.dtype).eps, len(start)
    steps = min(steps, size)
    basis, hessenberg = start.new_zeros(steps + 1, size), start.new_zeros(steps + 1, steps)
    for step in track(range(steps), "Arnoldi"):
        basis[step] = vector[0]
        rest, removed = remove(basis[None, : step + 1], multiply(vector))
        hessenberg[: step + 1, step] = removed[0]
        length = finite_norms(rest)[0]
        # After P vectors whatever is left is rounding, however long.
        if step + 1 == size or length <= small * hessenberg.abs().max():
            return basis[: step + 2], hessenberg[: step + 2, : step + 1]
        hessenberg[step + 1, step] = length
        vector = rest / length
    basis[steps] = vector[0]
    return basis, hessenberg


def ritz_values(hessenberg: Float[Tensor, "rows rank"]) -> Complex[Tensor, " rank"]:
    """Return the Ritz values of what `arnoldi` gave, the largest modulus first, in complex128 and main memory.

    >>> ritz_values(torch.tensor([[0.0, -2.0], [2.0, 0.0], [0.0, 0.0]])).imag.round()
    tensor([ 2., -2.], dtype=torch.float64)
    """
    return _sorted_eigenpairs(hessenberg)[0]


def ritz_pairs(
    basis: Float[Tensor, "rows P"], hessenberg: Float[Tensor, "rows rank"]
) -> tuple[Complex[Tensor, " rank"], Complex[Tensor, "rank P"]]:
    """Return the Ritz values as `ritz_values` does, and their unit vectors, with the precision and device of ``basis``.

    >>> values, vectors = ritz_pairs(*arnoldi(lambda rows: rows * torch.tensor([3.0, -5.0]), torch.ones(2), steps=2))
    >>> values.real.round().tolist(), vectors.abs().round(decimals=3)
    ([-5.0, 3.0], tensor([[0., 1.], [1., 0.]]))
    """
    values, vectors = _sorted_eigenpairs(hessenberg)
    wide = basis[:-1].to(basis.dtype.to_complex())
    return values, vectors.T.to(wide) @ wide


def _sorted_eigenpairs(hessenberg: Float[Tensor, "rows rank"]) -> tuple[Complex[Tensor, " rank"], Complex[Tensor, "rank rank"]]:
    values, vectors = torch.linalg.eig(hessenberg[:-1].to("cpu", torch.float64))
    order = values.abs().argsort(descending=True, stable=True)
    return values[order], vectors[:, order]
