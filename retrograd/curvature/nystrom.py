"""A randomised Nyström approximation of the Gauss-Newton matrix: its largest directions, and 0 beyond them.

    Ĝ = (G Ω) (Ωᵀ G Ω)⁻¹ (G Ω)ᵀ = U diag(σ) Uᵀ        f(Ĝ) v = f(0) v + U (f(σ) − f(0)) Uᵀ v

Ω          ``rank`` random orthonormal directions, [P, rank] (see `retrograd.linalg.nystrom`);
U, σ       eigenvectors and eigenvalues of Ĝ, which is never above G.

An inverse (σ + λ)⁻¹ takes all that is beyond the rank for flat: 1/λ, damping alone. All parameters are one block, and the mean
eigenvalue, which damping is relative to, is that of Ĝ: tr Ĝ / P ≤ tr G / P.

Assumptions: the matrix is positive semidefinite, and its eigenvalues fall off fast. Also a good preconditioner of
`ConjugateGradients`. Cost: ``rank`` products, 10 · rank² · P operations. Memory: rank · P in float64.

References: Frangella, Tropp, Udell (2023), "Randomized Nyström preconditioning"; Hataya, Yamada (2023), "Nyström method for
accurate and scalable implicit differentiation".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.curvature.fisher import ThinOperator
from retrograd.curvature.gauss_newton import GaussNewton
from retrograd.curvature.operator import Curvature
from retrograd.curvature.products import with_products
from retrograd.linalg import nystrom
from retrograd.params import Params, count
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class Nystrom:
    """Nyström approximation of a positive semidefinite curvature.

    Args:
        rank: of the approximation; at most the number of parameters.
        of: the curvature that it approximates, one with products.
    """

    rank: int = 100
    of: Curvature = field(default_factory=GaussNewton)

    citation: ClassVar[str] = """@inproceedings{hataya2023nystrom,
  title = {{Nystr{\\"o}m} Method for Accurate and Scalable Implicit Differentiation},
  author = {Hataya, Ryuichiro and Yamada, Makoto},
  booktitle = {International Conference on Artificial Intelligence and Statistics}, year = {2023}
}"""

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Tensor | None = None,
        scale: Params | None = None,
    ) -> ThinOperator:
        """Return the approximation of the mean over ``states``.

        Raises:
            InputError: the rank is out of its range, or ``of`` has no products.
            SolverFailed: the curvature has negative eigenvalues.
        """
        operator = with_products(self.of, self.of.fit(run, states, seed=seed, ids=ids, scale=scale))
        leaf, size = next(iter(operator.like.values())), count(operator.like)
        generator = torch.Generator().manual_seed(seed)
        found, vectors = nystrom(operator.rows, size, self.rank, generator=generator, dtype=leaf.dtype, device=leaf.device)
        values = torch.zeros(size, dtype=torch.float64, device=leaf.device)
        values[: self.rank] = found.double()
        return ThinOperator(values, vectors.double(), dict(operator.like))
