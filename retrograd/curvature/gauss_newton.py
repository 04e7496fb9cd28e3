"""The exact Gauss-Newton matrix, by its products with vectors.

    G v = (1/N) Σ_n J_nᵀ H_n J_n v        J_n = ∂f_n/∂θ,  H_n = ∂²ℓ_n/∂f_n²

f_n        the model's output for example n in evaluation mode, of any shape: what the task's ``outputs`` gives;
H_n        by autograd through the task's ``losses_of``: diag(p) − p pᵀ for cross-entropy (label smoothing shifts the gradient,
           not the curvature), 2/C for the squared error over C components.

One derivative forward to the outputs, H, and one reverse pass back; no labels are drawn. This is what the Fisher
matrices in this package estimate, and what iterative solvers need.

Assumptions: the task says what its outputs are (`retrograd.task.SplitTask`); that its losses are functions of them is checked
on every batch. Without negative eigenvalues if they are convex functions, which is taken for granted: negative ones count as
rounding. Cost: about three passes over the examples a vector. Functions of it: see `retrograd.curvature.products`.

References: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.curvature.products import ProductOperator, mean_product
from retrograd.curvature.pseudo_gradients import chosen
from retrograd.params import Params
from retrograd.task import BoundModel, check_split, split_task
from retrograd.trajectory import Run, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.modes import evaluation_mode

_TANGENTS = 64  # vectors whose derivatives are taken together


@dataclass(frozen=True)
class GaussNewton:
    """The exact Gauss-Newton matrix of the mean training loss, by products.

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

    citation: ClassVar[str] = """@article{schraudolph2002fast,
  title = {Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent},
  author = {Schraudolph, Nicol N.},
  journal = {Neural Computation}, volume = {14}, number = {7}, year = {2002}
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
            InputError: the task does not say what its outputs are, the model is too large for an explicit matrix, or an option
                is out of its range.
        """
        split_task(run.update_map.task)
        ids = chosen(run.examples, self.examples, seed, ids)

        def product(state: TrainingState, vectors: Params, some: Tensor) -> Params:
            return gauss_newton_product(run, state, vectors, some, self.batch_size)

        return ProductOperator(product, tuple(states), ids, scale, self.lanczos_steps, self.probes, seed, definite=True)


def gauss_newton_product(
    run: Run, state: TrainingState, vectors: Params, ids: Tensor | None = None, batch_size: int = 256
) -> Params:
    """Multiply vectors by the mean Gauss-Newton matrix of the examples' losses.

    Args:
        run: gives model, task and examples.
        state: where the model is.
        vectors: a leading axis ``query`` on every leaf.
        ids: the examples to average over, ``[example]``; all if not given.
        batch_size: how many of them at once; the result does not depend on it.

    Returns:
        G v, shaped like ``vectors``.

    Raises:
        InputError: the task does not say what its outputs are, or gives other losses for them.

    >>> from torch import nn
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), order=torch.tensor([[0, 1]]))
    >>> gauss_newton_product(run, run.final_state, {"weight": torch.ones(1, 1, 1)})["weight"].item()    # mean of 2 x²
    10.0
    """
    split_task(run.update_map.task)
    return mean_product(_of_batch, run, state, vectors, ids, batch_size, "Gauss-Newton products")


def _of_batch(update_map: UpdateMap, state: TrainingState, batch: Any, vectors: Params) -> Params:
    task, bound = split_task(update_map.task), BoundModel(update_map.model)

    def outputs(params: Params) -> Tensor:
        return bound(task.outputs, {**params, **state.buffers}, batch)

    def loss(outputs: Tensor) -> Tensor:
        return task.losses_of(outputs, batch).sum()

    with evaluation_mode(update_map.model), twice_differentiable(own_functions=False):
        found, pull = torch.func.vjp(outputs, state.params)[:2]
        # H is symmetric, so a pullback through ∂ℓ/∂f multiplies by it, and its graph is shared by all vectors.
        curve = torch.func.vjp(torch.func.grad(loss), found.detach())[1]
        check_split(task, bound(task.losses, {**state.params, **state.buffers}, batch), task.losses_of(found, batch))

        def product(vector: Params) -> Params:
            moved = torch.func.jvp(outputs, (state.params,), (vector,))[1]
            return pull(curve(moved)[0])[0]

        return torch.func.vmap(product, chunk_size=_TANGENTS)({name: vectors[name] for name in state.params})
