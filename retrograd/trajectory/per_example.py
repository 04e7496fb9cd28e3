"""Values and gradients of every row of a batch by itself: the raw material of all approximate methods.

    rows[n] = f(θ, batch[n]),   gradients[n] = ∂f(θ, batch[n]) / ∂θ

Rows are taken together where the model can be vectorised over them, else one after the other: control flow that looks at
values, and batches of more than tensors, cannot.

Cost: a forward and a backward pass of the rows. Memory: their activations and [row, P].
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.params import Params
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.state import TrainingState, map_batch
from retrograd.trajectory.update_map import UpdateMap

_PER_ROW = (RuntimeError, ValueError)  # what torch.func.vmap raises where it cannot


def per_example(
    function: Callable[[Params, Any], Tensor],
    point: Params,
    batch: Any,
    size: int,
    row_of: Callable[[int], Any] | None = None,
) -> tuple[Float[Tensor, " row"], Params]:
    """Return values and gradients of ``function`` for each row of a batch.

    Args:
        function: maps (parameters, a batch of one row) to one number for that row, shape ``[1]``.
        point: where; gradients are taken with respect to all of it.
        batch: tensors with a leading axis ``row``, in any nest of tuples, lists and dicts.
        size: number of rows.
        row_of: gives the batch of one row, for batches that cannot be cut because they hold more than tensors.

    >>> values, gradients = per_example(lambda p, x: (p["a"] * x).square(), {"a": torch.tensor(2.0)}, torch.ones(3), 3)
    >>> values.tolist(), gradients["a"].tolist()
    ([4.0, 4.0, 4.0], [4.0, 4.0, 4.0])
    """

    def one(point: Params, row: Any) -> Tensor:
        return function(point, map_batch(lambda leaf: leaf[None], row))[0]  # vmap took the row axis

    with twice_differentiable(own_functions=False):  # fused attention has no batched form
        try:
            gradients, values = torch.func.vmap(torch.func.grad_and_value(one), in_dims=(None, 0))(point, batch)
        except _PER_ROW:
            cut = row_of or (lambda row: map_batch(lambda leaf: leaf[row : row + 1], batch))
            parts = [_alone(function, point, cut(row)) for row in range(size)]
            values = torch.stack([value for value, _ in parts])
            gradients = {name: torch.stack([own[name] for _, own in parts]) for name in point}
    return values, gradients


def _alone(function: Callable[[Params, Any], Tensor], point: Params, row: Any) -> tuple[Tensor, Params]:
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in point.items()}
    value = function(own, row)[0]
    gradients = torch.autograd.grad(value, list(own.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(own, gradients, strict=True))


def loss_gradients(update_map: UpdateMap, state: TrainingState, batch: Any, size: int, names: tuple[str, ...]) -> Params:
    """Return ∇ℓ_n of every example of a batch with respect to the parameters ``names``, in evaluation mode."""
    fixed = {name: leaf for name, leaf in state.params.items() if name not in names}

    def loss(params: Params, row: Any) -> Tensor:
        return update_map.losses(TrainingState({**fixed, **params}, state.slots, state.buffers, state.step), row)

    return per_example(loss, {name: state.params[name].detach() for name in names}, batch, size)[1]
