"""Products with the exact Gauss-Newton matrix, without forming it.

    G v = (1/N) Σ_n J_nᵀ H_n J_n v        J_n = ∂f_n/∂θ,  H_n = ∂²ℓ_n/∂f_n²

f_n        the model's output for example n in evaluation mode;
H_n        diag(p) − p pᵀ for `Classification` (label smoothing shifts the gradient, not the curvature); 2/C for `Regression`.

One forward-mode derivative to the outputs, H, and one reverse pass back; no labels are drawn. This is what the Fisher
matrices in this package estimate, and what iterative solvers need.

Assumptions: the loss is a convex function of the model's output, which is known for the two tasks above.
Cost: about three passes over the examples a vector.

References: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
"""

from typing import Any

import torch
from torch import Tensor, nn

from retrograd.curvature.operator import check_names
from retrograd.curvature.pseudo_gradients import device_of
from retrograd.errors import InputError
from retrograd.params import Params, map_params, zeros_like
from retrograd.progress import track
from retrograd.task import BoundModel, Classification, Regression
from retrograd.trajectory import Run, TrainingState
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.trajectory import to_device
from retrograd.trajectory.update_map import evaluation_mode


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
        InputError: the task has no known curvature in the model's output.
    """
    update_map, examples = run.update_map, run.examples
    task = update_map.task
    # A subclass may have losses of its own, whose curvature is not the parent's.
    known = [kind for kind in (Classification, Regression) if getattr(type(task), "losses", None) is kind.losses]
    if not known:
        raise InputError(
            f"the curvature of {type(task).__name__}'s losses in the model's output is not known. It is for Classification "
            "and Regression; for other tasks give them `sampled` (see retrograd.task.Samples) and use Fisher, KFAC or EKFAC."
        )
    check_names(vectors, update_map.names)
    ids = examples.ids if ids is None else ids
    if not len(ids):
        raise InputError("a mean over examples needs at least one id, got none.")
    bound, total = BoundModel(update_map.model), zeros_like(vectors)
    for part in track(ids.split(batch_size), "Gauss-Newton products"):
        batch = to_device(examples.batch(part), device_of(state))

        def outputs(params: Params, batch: Any = batch) -> Tensor:
            return bound(_outputs, {**params, **state.buffers}, batch)

        with evaluation_mode(update_map.model), twice_differentiable(own_functions=False):
            found, pull = torch.func.vjp(outputs, state.params)[:2]

            def product(vector: Params, found: Tensor = found, pull: Any = pull, outputs: Any = outputs) -> Params:
                moved = torch.func.jvp(outputs, (state.params,), (vector,))[1]
                return pull(_output_curvature(known[0], found, moved))[0]

            products = torch.func.vmap(product)({name: vectors[name] for name in state.params})
        total = map_params(lambda sum_, leaf: sum_ + leaf, total, products)
    return map_params(lambda leaf: leaf / len(ids), total)


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def _output_curvature(kind: type, outputs: Tensor, tangent: Tensor) -> Tensor:
    if kind is Regression:
        return tangent * (2 / outputs[0].numel())
    probabilities = outputs.detach().softmax(dim=-1)
    moved = probabilities * tangent
    return moved - probabilities * moved.sum(dim=-1, keepdim=True)
