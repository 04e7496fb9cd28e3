"""A low-rank approximation of a positive semidefinite operator, from its products with random vectors.

    Â = Y (Ωᵀ Y)⁻¹ Yᵀ,  Y = A Ω            computed for A + νI, and ν taken from the eigenvalues in the end:
    Y + νΩ = B C,  CᵀC = Ωᵀ(Y + νΩ),       B = U Σ Wᵀ,  Â = U max(Σ² − ν, 0) Uᵀ           (Tropp et al. 2017, algorithm 3)

Ω          random orthonormal columns, [P, rank];
ν          a shift the size of rounding, without which there is no Cholesky factor C when A has a rank below ``rank``.

Assumptions: A is symmetric and positive semidefinite. Then 0 ≤ Â ≤ A, and Â = A when ``rank`` is at least the rank of A (best
ask for twice that: without spare columns ΩᵀY may be so ill-conditioned that in float32 few digits are left). With
eigenvalues λ₁ ≥ λ₂ ≥ … and any p from 2 to rank − 2, the expected error in the spectral norm is at most
(1 + 2(rank − p)/(p − 1)) λ_{rank−p+1} + 2e² rank/(p² − 1) Σ_{j>rank−p} λ_j: good where eigenvalues decay fast.
Cost: one product with ``rank`` vectors at once, 10 · rank² · P operations, memory 5 · rank · P.

References: Tropp, Yurtsever, Udell & Cevher (2017), "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data"; Frangella, Tropp & Udell (2023), "Randomized Nyström preconditioning".
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, SolverFailed
from retrograd.linalg.orthonormal import finite_norms


def nystrom(
    multiply: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "P rank"]]:
    """Return the eigenvalues of Â, descending and not negative, and its orthonormal eigenvectors as columns.

    Args:
        multiply: multiplies every row of ``[rank, P]`` by A.
        size: P.
        rank: the rank of Â, between 1 and P.
        generator: draws Ω. One in main memory gives the same on every device.
        dtype: of the vectors that ``multiply`` takes.
        device: where they are; where the generator is, if not given.

    Raises:
        InputError: ``rank`` is out of its range.
        NonFinite: a product is not finite.
        SolverFailed: A is not positive semidefinite.

    >>> seed = torch.Generator().manual_seed(0)
    >>> values, vectors = nystrom(lambda rows: rows * torch.tensor([0.0, 4.0, 0.0]), 3, 2, generator=seed)
    >>> values.round(decimals=4), vectors[:, 0].abs().round(decimals=3)
    (tensor([4., 0.]), tensor([0., 1., 0.]))
    """
    if not 1 <= rank <= size:
        raise InputError(f"rank must be between 1 and the number of parameters, {size}, got {rank}.")
    normal = torch.randn(size, rank, generator=generator, dtype=torch.float64, device=generator.device)
    test = torch.linalg.qr(normal.to(device or generator.device, dtype)).Q
    sketch = multiply(test.T).T
    length = torch.linalg.vector_norm(finite_norms(sketch.T)).item()
    if length == 0:
        return sketch.new_zeros(rank), test
    eps = torch.finfo(dtype).eps
    shift = eps * length
    while True:
        shifted = sketch + shift * test
        core = test.T @ shifted
        factor, wrong = torch.linalg.cholesky_ex((core + core.T) / 2, upper=True)
        if not wrong:
            break
        # As small as will do, since it costs accuracy: products less exact than their dtype need more of it. What needs much
        # more is not rounding.
        shift *= 10
        if shift > eps**0.5 * length:
            raise SolverFailed(
                "the Nyström approximation needs a symmetric positive semidefinite operator, but there is a vector x with "
                "x·Ax < 0. Add damping, or take the Gauss-Newton matrix in place of the Hessian."
            )
    thin = torch.linalg.solve_triangular(factor, shifted, upper=True, left=False)
    vectors, roots, _ = torch.linalg.svd(thin, full_matrices=False)
    return (roots**2 - shift).clamp(min=0.0), vectors
