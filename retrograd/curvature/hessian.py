"""The exact Hessian of the mean training loss, by its products with vectors.

    H v = (1/N) Σ_n ∂²ℓ_n/∂θ² v = d/ds ∇L(θ + s v) at s = 0        (Pearlmutter 1994)

ℓ_n        loss of training example n with its own target, in evaluation mode. No weight decay: a method adds the optimizer's.

One derivative forward of the gradient, which is one reverse pass. In contrast to the Gauss-Newton matrix it knows the curvature
of the network itself, and asks nothing of the task but its losses. Where training has not converged it has negative
eigenvalues, with which an inverse is no influence: methods then ask for more damping than the most negative one.

Assumptions: the loss can be differentiated twice; where it cannot (ReLU at 0) autograd's one-sided choice is taken. Cost: about
three passes over the examples a vector. Functions of it: see `retrograd.curvature.products`.

References: Pearlmutter (1994), "Fast exact multiplication by the Hessian"; Koh, Liang (2017), "Understanding black-box
predictions via influence functions" (its use in influence functions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.curvature.products import ProductOperator, mean_product
from retrograd.curvature.pseudo_gradients import chosen
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable

_TANGENTS = 64  # vectors whose derivatives are taken together


@dataclass(frozen=True)
class Hessian:
    """The Hessian of the mean training loss, by products.

    Args:
        lanczos_steps: products for a function of a vector, or None to make the matrix explicit (small models).
        examples: which training examples to average over: so many at random, those with these ids, or all.
        batch_size: examples taken together; the result does not depend on it.
        probes: products with random signs for the mean eigenvalue, which damping is relative to.
    """

    lanczos_steps: int | None = 30
    examples: int | Sequence[int] | None = None
    batch_size: int = 256
    probes: int = 32

    citation: ClassVar[str] = """@article{pearlmutter1994fast,
  title = {Fast Exact Multiplication by the {Hessian}},
  author = {Pearlmutter, Barak A.},
  journal = {Neural Computation}, volume = {6}, number = {1}, year = {1994}
}"""

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Tensor | None = None,
        scale: Params | None = None,
    ) -> ProductOperator:
        """Return the operator; nothing is computed before it is used.

        Raises:
            InputError: the model is too large for an explicit matrix, or an option is out of its range.
        """
        ids = chosen(run.examples, self.examples, seed, ids)

        def product(state: TrainingState, vectors: Params, some: Tensor) -> Params:
            return hessian_product(run, state, vectors, some, self.batch_size)

        return ProductOperator(product, tuple(states), ids, scale, self.lanczos_steps, self.probes, seed, definite=False)


def hessian_product(
    run: Run, state: TrainingState, vectors: Params, ids: Tensor | None = None, batch_size: int = 256
) -> Params:
    """Multiply vectors by the Hessian of the mean of the examples' losses.

    Args:
        run: gives model, task and examples.
        state: where the model is.
        vectors: a leading axis ``query`` on every leaf.
        ids: the examples to average over, ``[example]``; all if not given.
        batch_size: how many of them at once; the result does not depend on it.

    Returns:
        H v, shaped like ``vectors``.

    Raises:
        InputError: the task has no losses of single examples.

    >>> from torch import nn
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), order=torch.tensor([[0, 1]]))
    >>> hessian_product(run, run.final_state, {"weight": torch.ones(1, 1, 1)})["weight"].item()    # mean of 2 x²
    10.0
    """
    return mean_product(_of_batch, run, state, vectors, ids, batch_size, "Hessian products")


def _of_batch(update_map: UpdateMap, state: TrainingState, batch: Any, vectors: Params) -> Params:
    def loss(params: Params) -> Tensor:
        return update_map.losses(TrainingState(params, state.slots, state.buffers, state.step), batch).sum()

    def product(vector: Params) -> Params:
        return torch.func.jvp(torch.func.grad(loss), (state.params,), (vector,))[1]

    with twice_differentiable(own_functions=False):
        return torch.func.vmap(product, chunk_size=_TANGENTS)({name: vectors[name] for name in state.params})
