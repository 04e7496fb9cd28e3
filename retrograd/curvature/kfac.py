"""K-FAC: each layer's curvature is a Kronecker product of two small matrices (Martens and Grosse 2015).

    G ≈ ⊕_layers S ⊗ A        f(G) V = Q_S (f(s aᵀ) ∘ (Q_Sᵀ V Q_A)) Q_Aᵀ        S = Q_S diag(s) Q_Sᵀ,  A = Q_A diag(a) Q_Aᵀ

V          a layer's [weight | bias], [out, in + 1];
A, S       second moments of inputs and of output gradients with sampled targets (see `factors`), averaged over the states.

Assumptions: no curvature between layers; inputs independent of output gradients. Exact for one linear layer with a single
input, or with output gradients that have the same distribution for all inputs (linear regression). Fails where few
examples carry all of the gradient, which a well-trained classifier's do: `EKFAC` corrects the scale at little more cost.
Parameters outside linear layers and convolutions get their exact diagonal. Embeddings and weights tied to others do, too.

Cost: three passes over the examples a state, one of them backwards, and eigendecompositions of in³ + out³ a layer.

References: Martens, Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature", section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.curvature.factors import fit_factors
from retrograd.curvature.operator import BlockOperator
from retrograd.curvature.pseudo_gradients import PseudoBatches, chosen
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class KFAC:
    """Kronecker-factored Fisher matrix.

    Args:
        batch_size: examples taken together; the result does not depend on it.
        samples: how often targets are drawn for each example.
        examples: which training examples to average over: so many at random, those with these ids, or all.
    """

    batch_size: int = 256
    samples: int = 1
    examples: int | Sequence[int] | None = None

    citation: ClassVar[str] = """@inproceedings{martens2015kfac,
  title = {Optimizing Neural Networks with Kronecker-factored Approximate Curvature},
  author = {Martens, James and Grosse, Roger},
  booktitle = {International Conference on Machine Learning}, year = {2015}
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
        """Return the K-FAC operator of factors averaged over ``states``.

        Raises:
            InputError: the task cannot draw its own targets.
        """
        ids = chosen(run.examples, self.examples, seed, ids)
        source = PseudoBatches(run.update_map, run.examples, ids, self.batch_size, self.samples, seed, states)
        factors = fit_factors(source, keep=False, scale=scale)
        return factors.operator({name: torch.outer(own.out_values, own.in_values) for name, own in factors.bases.items()})
