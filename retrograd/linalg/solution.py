"""What a solver of A v = q found, and how far to trust it."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """Solutions of A v = q for several q.

    Attributes:
        values: v, a row for each right-hand side.
        residuals: ‖q − A v‖ / ‖q‖ of these ``values``, measured with a product of its own; 0 where q is 0.
        iterations: how many iterations were made; a row that converged earlier did not change after it did.
        converged: whether the residual is at most the tolerance that was asked for.
    """

    values: Float[Tensor, "query P"]
    residuals: Float[Tensor, " query"]
    iterations: int
    converged: Bool[Tensor, " query"]
