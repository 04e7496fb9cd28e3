"""The diagonal of the Fisher matrix, exact up to the sampling of targets.

    G_jj = E_n[g_nj²]        f(G) v = f(G_jj) v_j

g_n        pseudo-gradient of an example with sampled targets, summed over its positions (see `pseudo_gradients`).

A block for every parameter, which is what damping relative to a mean eigenvalue is relative to.

Assumptions: parameters do not interact, which in networks they do; a baseline, and what adaptive optimizers and elastic weight
consolidation take. Cost: a gradient for every example, a few passes over the data, and one number a parameter.

References: LeCun, Denker, Solla (1990), "Optimal brain damage" (a diagonal Hessian); Kirkpatrick et al. (2017), "Overcoming
catastrophic forgetting in neural networks" (the diagonal Fisher matrix).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.curvature.operator import BlockOperator, DiagonalBlock
from retrograd.curvature.pseudo_gradients import PseudoBatches, chosen, per_example_gradients
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class Diagonal:
    """The Fisher matrix's diagonal.

    Args:
        samples: how often targets are drawn for each example.
        batch_size: examples taken together; the result does not depend on it.
        examples: which training examples to average over: so many at random, those with these ids, or all.
    """

    samples: int = 1
    batch_size: int = 256
    examples: int | Sequence[int] | None = None

    citation: ClassVar[str] = """@article{kirkpatrick2017overcoming,
  title = {Overcoming Catastrophic Forgetting in Neural Networks},
  author = {Kirkpatrick, James and others},
  journal = {Proceedings of the National Academy of Sciences}, volume = {114}, number = {13}, year = {2017}
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
        """Return the diagonal, averaged over ``states``.

        Raises:
            InputError: the task cannot draw its own targets.
        """
        ids = chosen(run.examples, self.examples, seed, ids)
        source = PseudoBatches(run.update_map, run.examples, ids, self.batch_size, self.samples, seed, states)
        names = run.update_map.names
        sums = {name: torch.zeros_like(states[0].params[name], dtype=torch.float64) for name in names}
        for _, state, size, batch in source.over("curvature: diagonal"):
            for grads in per_example_gradients(run.update_map, state, batch, size, names):
                for name, leaf in grads.items():
                    sums[name] += leaf.square().sum(0, dtype=torch.float64)
        # One number a parameter: a scale only multiplies it.
        squares = {name: 1.0 if scale is None else scale[name].double().square() for name in names}
        return BlockOperator(tuple(DiagonalBlock(name, squares[name] * leaf / source.count) for name, leaf in sums.items()))
