"""The whole Fisher matrix of a small model, without any structure, as the thin factor that it is.

    G = Jᵀ J        J [M, P], rows g_n / √M        f(G) v = f(0) v + V (f(σ) − f(0)) Vᵀ v

g_n        pseudo-gradient of an example with sampled targets (see `pseudo_gradients`);
M          examples × samples × states;
σ, V       the eigenvalues above 0 of G with their eigenvectors: from J Jᵀ = U σ Uᵀ, V = Jᵀ U σ^(−½), or from Jᵀ J where P < M.

All parameters are one block: ``function`` sees P eigenvalues, those beyond the rank as zeros. Eigenvalues below rounding
(min(M, P) · ε · the largest) count as 0.

Assumptions: none but the sampling, whose error falls as 1/√M. With few samples per parameter the rank M is what limits it.
Cost: a gradient for every example, min(M, P)² · max(M, P) multiplications, memory M · P in float64. For up to a few thousand
examples or parameters; beyond, use `EKFAC`.

References: Martens (2020), "New insights and perspectives on the natural gradient method", section 9.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.curvature.operator import Function, check_names
from retrograd.curvature.pseudo_gradients import PseudoBatches, chosen, per_example_gradients
from retrograd.params import Params, map_params, unflatten
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class Fisher:
    """The full Fisher matrix with sampled targets, for small models.

    Args:
        samples: how often targets are drawn for each example.
        batch_size: examples taken together; the result does not depend on it.
        examples: which training examples to average over: so many at random, those with these ids, or all.
    """

    samples: int = 1
    batch_size: int = 256
    examples: int | Sequence[int] | None = None

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Tensor | None = None,
        scale: Params | None = None,
    ) -> "ThinOperator":
        """Return the Fisher matrix, averaged over ``states``.

        Raises:
            InputError: the task cannot draw its own targets.
        """
        ids = chosen(run.examples, self.examples, seed, ids)
        source = PseudoBatches(run.update_map, run.examples, ids, self.batch_size, self.samples, seed, states)
        names = run.update_map.names
        parts = []
        for _, state, size, batch in source.over("curvature: gradients"):
            for grads in per_example_gradients(run.update_map, state, batch, size, names):
                grads = grads if scale is None else map_params(torch.mul, grads, scale)
                parts.append(_rows(grads, names).double())
        rows = torch.cat(parts) / source.count**0.5
        return ThinOperator(*thin_eigenvectors(rows), {name: states[0].params[name] for name in names})


@dataclass(frozen=True)
class ThinOperator:
    """V diag(σ) Vᵀ with fewer columns in V than parameters.

    Attributes:
        eigenvalues: σ, all P of them, zeros last.
        eigenvectors: V, those of the first r eigenvalues.
        like: the parameters, for their names and shapes.
        drop: take f = 0 beyond the columns in place of f(0).
    """

    eigenvalues: Float[Tensor, " P"]
    eigenvectors: Float[Tensor, "P rank"]
    like: Params
    drop: bool = False

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v for vectors with a leading axis ``query`` on every leaf; see `Operator.apply`."""
        check_names(vectors, tuple(self.like))
        matrix = _rows(vectors, self.like)
        values, rank = function(self.eigenvalues, self.eigenvalues.mean().item()), self.eigenvectors.shape[1]
        beyond = values[-1] if rank < len(values) and not self.drop else values.new_zeros(())
        basis = self.eigenvectors
        wide = matrix.double()
        result = beyond * wide + (wide @ basis * (values[:rank] - beyond)) @ basis.T
        found = unflatten(result.to(matrix), self.like)
        return {name: found[name] for name in vectors}


def _rows(vectors: Params, names: Iterable[str]) -> Tensor:
    """[query, P]; parameters may be single numbers."""
    return torch.cat([vectors[name].reshape(len(vectors[name]), -1) for name in names], dim=1)


def thin_eigenvectors(rows: Float[Tensor, "M P"]) -> tuple[Float[Tensor, " P"], Float[Tensor, "P rank"]]:
    """Return all eigenvalues of JᵀJ, descending, and the eigenvectors of those above rounding.

    >>> values, vectors = thin_eigenvectors(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    >>> values.tolist(), vectors.abs()[:, 0].tolist()
    ([25.0, 0.0], [0.6, 0.8])
    """
    tall = rows.shape[0] > rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
    all_values = rows.new_zeros(rows.shape[1])
    all_values[:rank] = values[:rank]
    vectors = vectors[:, :rank]
    return all_values, vectors if tall else rows.T @ vectors / values[:rank].sqrt()
