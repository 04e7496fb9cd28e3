"""EK-FAC: K-FAC's eigenbasis with the right scale along each of its axes (George et al. 2018).

    Λ = E_n[(Q_Sᵀ G_n Q_A)²]        f(G) V = Q_S (f(Λ) ∘ (Q_Sᵀ V Q_A)) Q_Aᵀ        (Grosse et al. 2023, eq. 18 to 20)

V          a layer's [weight | bias], [out, in + 1];
G_n        pseudo-gradient of example n, Σ_t d_nt ā_ntᵀ, summed over its positions before it is squared;
Q_S, Q_A   eigenvectors (columns) of K-FAC's factors (see `factors`), shared by all states; Λ is averaged over them.

Of all matrices that are diagonal in the basis Q_S ⊗ Q_A this one is nearest to the layer's Fisher matrix, so EK-FAC is never
further from it than K-FAC. For one position Q_Sᵀ G_n Q_A = d̃ ãᵀ, and Λ is the product of the squared d̃ and ã: no matrix of
an example is formed. With several positions one is, for a slice of the examples at a time.

With a scale (see `operator`) the basis is that of the scale's nearest product of rows and columns; Λ is measured
with the whole of it.

Assumptions: no curvature between layers, and a Kronecker eigenbasis. Parameters outside linear layers and convolutions
get their exact diagonal. Where a factor has equal eigenvalues other than 0 its basis is arbitrary, and so is a little of Λ.

Cost: K-FAC's, and a second pass over the examples a state where the first one's activations are too many to keep.

References: George, Laurent, Bouthillier, Ballas, Vincent (2018), "Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis"; Grosse et al. (2023), "Studying large language model generalization with influence functions".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.curvature.factors import Basis, fit_factors, rows_again
from retrograd.curvature.operator import BlockOperator
from retrograd.curvature.pseudo_gradients import SCALARS_AT_ONCE, PseudoBatches, chosen
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class EKFAC:
    """Fisher matrix that is diagonal in K-FAC's eigenbasis.

    Args:
        batch_size: examples taken together; the result does not depend on it.
        samples: how often targets are drawn for each example.
        examples: which training examples to average over: so many at random, those with these ids, or all.
    """

    batch_size: int = 256
    samples: int = 1
    examples: int | Sequence[int] | None = None

    citation: ClassVar[str] = """@article{grosse2023studying,
  title = {Studying Large Language Model Generalization with Influence Functions},
  author = {Grosse, Roger and others},
  journal = {arXiv preprint arXiv:2308.03296}, year = {2023}
}
@inproceedings{george2018ekfac,
  title = {Fast Approximate Natural Gradient Descent in a {Kronecker}-factored Eigenbasis},
  author = {George, Thomas and Laurent, C{\\'e}sar and Bouthillier, Xavier and Ballas, Nicolas and Vincent, Pascal},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2018}
}"""

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Tensor | None = None,
        scale: Params | None = None,
    ) -> BlockOperator:
        """Return the EK-FAC operator with a basis shared by all ``states`` and eigenvalues averaged over them.

        Raises:
            InputError: the task cannot draw its own targets.
        """
        ids = chosen(run.examples, self.examples, seed, ids)
        source = PseudoBatches(run.update_map, run.examples, ids, self.batch_size, self.samples, seed, states)
        factors = fit_factors(source, keep=True, scale=scale)
        sums = {weight: torch.zeros_like(torch.outer(b.out_values, b.in_values)) for weight, b in factors.bases.items()}
        for rows in rows_again(source, factors):
            for weight, (left, right) in rows.items():
                sums[weight] += squares(factors.bases[weight], left, right, factors.residual(weight))
        means = {weight: leaf / source.count for weight, leaf in sums.items()}
        return factors.operator(means)


def squares(basis: Basis, left: Tensor, right: Tensor, residual: Tensor | None = None) -> Tensor:
    """Σ_n (Q_Sᵀ G_n Q_A)² of one batch, ``[out, in]``, from ā ``[batch, position, in]`` and d ``[batch, position, out]``.

    With a ``residual`` R ``[out, in]`` of the scale, G_n is R ∘ Σ_t d_nt ā_ntᵀ, which has to be formed before it is rotated.
    """
    step = max(1, SCALARS_AT_ONCE // (left.shape[2] * right.shape[2]))
    if residual is not None:
        out_basis, in_basis, residual = (leaf.to(left) for leaf in (basis.out_basis, basis.in_basis, residual))
        parts = zip(left.split(step), right.split(step), strict=True)
        rotated = (out_basis.T @ ((d.mT @ a) * residual) @ in_basis for a, d in parts)
        return torch.stack([own.square().sum(0, dtype=torch.float64) for own in rotated]).sum(0)
    left, right = left @ basis.in_basis.to(left), right @ basis.out_basis.to(right)
    if left.shape[1] == 1:
        return (right[:, 0].square().T @ left[:, 0].square()).double()
    parts = zip(left.split(step), right.split(step), strict=True)
    return torch.stack([(d.mT @ a).square().sum(0, dtype=torch.float64) for a, d in parts]).sum(0)
