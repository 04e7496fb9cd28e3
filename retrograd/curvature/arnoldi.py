"""The largest eigenpairs of a curvature from one Krylov space, and nothing beyond them.

    f(G) v := U f(σ) Uᵀ v        G u_j ≈ σ_j u_j,  j ≤ rank

U, σ       the largest Ritz values of one random start vector after ``steps`` Lanczos steps, which is Arnoldi's iteration of a
           symmetric matrix, and their unit vectors (see `retrograd.linalg.eigenpairs`).

That is the published method: f is taken to be 0, not f(0), on what is dropped. For an inverse those are the directions where
it is largest, so that an inner product there loses all that flat directions have to say, and they say much about removed
examples; `Nystrom` keeps them as 1/λ. The mean eigenvalue, which damping is relative to, is Σ σ_j / P of those that are kept.

Assumptions: the start vector has a share in every eigenvector that is wanted; of a repeated eigenvalue one is found. Give some
times as many steps as rank. With ``of=Hessian()`` the largest are kept, and none of the negative ones unless the rank reaches
down to them. Cost: ``steps`` products. Memory: steps · P, then rank · P in float64.

References: Schioppa, Zablotskaia, Vilar, Sokolov (2022), "Scaling up influence functions"; Arnoldi (1951), "The principle of
minimized iterations in the solution of the matrix eigenvalue problem".
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
from retrograd.linalg import eigenpairs
from retrograd.params import Params, count
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class Arnoldi:
    """The largest eigenpairs of a curvature; everything else is dropped.

    Args:
        steps: products with the curvature; at most the number of parameters are of use.
        rank: how many eigenpairs are kept.
        of: the curvature, one with products.
    """

    steps: int = 200
    rank: int = 50
    of: Curvature = field(default_factory=GaussNewton)

    citation: ClassVar[str] = """@inproceedings{schioppa2022scaling,
  title = {Scaling Up Influence Functions},
  author = {Schioppa, Andrea and Zablotskaia, Polina and Vilar, David and Sokolov, Artem},
  booktitle = {AAAI Conference on Artificial Intelligence}, year = {2022}
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
        """Return the kept eigenpairs of the mean over ``states``.

        Raises:
            InputError: the Krylov space has fewer dimensions than the rank, or ``of`` has no products.
        """
        operator = with_products(self.of, self.of.fit(run, states, seed=seed, ids=ids, scale=scale))
        leaf, size = next(iter(operator.like.values())), count(operator.like)
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(leaf)
        found, vectors = eigenpairs(operator.rows, start, self.steps, self.rank)
        values = torch.zeros(size, dtype=torch.float64, device=leaf.device)
        values[: self.rank] = found.double()
        return ThinOperator(values, vectors.T.double(), dict(operator.like), drop=True)
