"""Rows of length one, and orthogonal to each other.

    V = Rᵀ Q        Q Qᵀ = I,  R upper triangular,  R_ii ≥ 0

V          the vectors, as rows; Q, R: the same rows made orthonormal, first to last, and what they were made of.

With R_ii ≥ 0 the factors of independent vectors are unique. R_ii is then the length of what vector i adds to those before
it, and the mean of log R_ii along a trajectory of tangents converges to the i-th Lyapunov exponent.

Dependent vectors are no error: a singular map makes tangents dependent, and its exponent is log 0 = −∞. Where vector i lies
in the span of those before it up to rounding (100 ε of its own length, so that scales do not matter), R_ii is exactly 0,
and row i of Q is some unit vector orthogonal to all others.

Cost: Householder reflections, 4 · count² · P operations.

References: Benettin et al. (1980), "Lyapunov characteristic exponents for smooth dynamical systems"; Parlett (1980), "The
symmetric eigenvalue problem", section 6.9 (twice is enough).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, NonFinite

ROUNDING = 100.0
"""What is shorter than this many units of rounding, relative to what it was made of, is taken for 0."""


def orthonormalise(
    vectors: Float[Tensor, "*start count P"],
) -> tuple[Float[Tensor, "*start count P"], Float[Tensor, "*start count count"]]:
    """Make vectors orthonormal, first to last.

    Args:
        vectors: the rows V; not more of them than they are long. Leading axes hold several such sets.

    Returns:
        Q, with orthonormal rows, and R, upper triangular with a diagonal ≥ 0, such that ``R.T @ Q`` equals ``vectors``.

    Raises:
        InputError: there are more vectors than dimensions.
        NonFinite: a vector is not finite.

    >>> rows, upper = orthonormalise(torch.tensor([[0.0, 3.0], [2.0, 4.0]]))
    >>> rows.tolist(), upper.tolist()
    ([[0.0, 1.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 2.0]])
    """
    count, size = vectors.shape[-2:]
    if count > size:
        raise InputError(f"{count} vectors of {size} numbers cannot be orthogonal to each other. Give at most {size}.")
    norms = finite_norms(vectors.reshape(-1, size)).reshape(vectors.shape[:-1])
    small = ROUNDING * torch.finfo(vectors.dtype).eps * norms
    columns, upper = torch.linalg.qr(vectors.mT)
    lengths = upper.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(lengths < 0, -1.0, 1.0).to(vectors)
    lengths = torch.where(lengths.abs() <= small, 0.0, lengths.abs())
    upper = (signs[..., None] * upper).triu(1) + lengths.diag_embed()
    # Adding 0 turns -0.0 into 0.0, which prints better.
    return signs[..., None] * columns.mT + 0.0, upper + 0.0


def normalise(vectors: Float[Tensor, "query P"]) -> tuple[Float[Tensor, "query P"], Float[Tensor, " query"]]:
    """Return the rows with length one, and how long they were; rows of zeros stay zeros.

    Raises:
        NonFinite: a vector is not finite.
    """
    norms = finite_norms(vectors)
    return vectors / torch.where(norms > 0, norms, 1.0)[:, None], norms


def finite_norms(vectors: Float[Tensor, "query P"]) -> Float[Tensor, " query"]:
    """Return the lengths of the rows.

    Raises:
        NonFinite: a vector is not finite.
    """
    norms = torch.linalg.vector_norm(vectors, dim=1)
    wrong = ~norms.isfinite()
    if wrong.any():
        raise NonFinite(
            f"vector {int(wrong.nonzero()[0])} is not finite, or too long for {vectors.dtype}. Look for NaN or infinity in "
            "what was given and in its products with the operator, or compute with more bits."
        )
    return norms


def remove(
    basis: Float[Tensor, "query rank P"], vectors: Float[Tensor, "query P"]
) -> tuple[Float[Tensor, "query P"], Float[Tensor, "query rank"]]:
    """Make vectors orthogonal, each to its own orthonormal basis; return what is left, and the coefficients of what is not."""
    total = basis.new_zeros(basis.shape[:2])
    # Once leaves rounding as large as what was removed, which may be much longer than what is left; twice is enough. All
    # at once (classical Gram-Schmidt) and not one by one (modified): made twice it is as good, and is matrix products.
    for _ in range(2):
        coefficients = torch.einsum("qrp,qp->qr", basis, vectors)
        vectors = vectors - torch.einsum("qrp,qr->qp", basis, coefficients)
        total = total + coefficients
    return vectors, total
