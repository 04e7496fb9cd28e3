"""The curvature's own eigenvalues: x = Q (1 / (w σ + δ + λ)) Qᵀ ∇f.

Exact for the curvature that is given: explicit, Kronecker-factored, diagonal or of low rank, each with the damping of its own
blocks. Cost: fitting the curvature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.adjoint.solvers.solver import System
from retrograd.errors import SolverFailed
from retrograd.params import Params


@dataclass(frozen=True)
class Spectral:
    """Applies the inverse as a function of the curvature."""

    def solve(self, system: System, right: Params, /) -> Params:
        """Return (w G + δ + λ)⁻¹ of all right-hand sides."""
        weight = system.run.mean_weight

        def inverse(eigenvalues: Tensor, mean: float) -> Tensor:
            shifted = weight * eigenvalues + system.shift(mean)
            if not shifted.any():  # a block that no loss depends on: nothing to score there
                return shifted
            if not (shifted > 0).all():
                raise SolverFailed(
                    f"the damped curvature has the eigenvalue {shifted.min().item():.3g}, so this is no minimum. Give more "
                    "damping, or a positive semidefinite curvature (EKFAC(), GaussNewton())."
                )
            return torch.reciprocal(shifted)

        return system.operator().apply(inverse, right)
