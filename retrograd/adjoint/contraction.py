"""The contraction of approximate adjoints: costates at a checkpoint × gradients of the training examples there.

    products[q, i] = ⟨v_q, ∇ℓ_i(θ_c)⟩

v_q     one vector for each query, of the shape of the parameters;
θ_c     the parameters at the checkpoint; losses are taken in evaluation mode.

Every parameter is covered, because the gradients are those of the loss itself. Cost: a pass over the examples and one matrix
product [query, P] × [P, example]. Memory: the gradients of one batch of examples.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from retrograd.adjoint.adjoint import ScorePart
from retrograd.params import Params, flatten
from retrograd.trajectory import Examples, TrainingState, UpdateMap
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.state import map_batch
from retrograd.trajectory.trajectory import to_device


def example_gradients(update_map: UpdateMap, examples: Examples, state: TrainingState, ids: Tensor) -> Params:
    """Return ∇ℓ_i of the examples with these ids, a leading axis ``example`` on every leaf."""
    batch = to_device(examples.batch(ids), next(iter(state.params.values())).device)

    def loss(params: Params, row: object) -> Tensor:
        own = TrainingState(params, state.slots, state.buffers, state.step)
        return update_map.losses(own, map_batch(lambda leaf: leaf[None], row))[0]  # vmap took the batch axis

    with twice_differentiable(own_functions=False):  # fused attention has no batched form
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state.params, batch)


def contract(
    update_map: UpdateMap,
    examples: Examples,
    state: TrainingState,
    vectors: Params,
    batches: Sequence[Tensor],
    scale: float = 1.0,
) -> Iterator[ScorePart]:
    """Yield ``scale`` · ⟨v_q, ∇ℓ_i⟩ for the examples of one batch after the other.

    Args:
        update_map: the run's update map.
        examples: the training examples.
        state: the checkpoint.
        vectors: v, a leading axis ``query`` on every leaf.
        batches: ids of the examples of each batch.
        scale: a factor on all products.
    """
    matrix = flatten(vectors.values(), batched=True) * scale
    for ids in batches:
        gradients = example_gradients(update_map, examples, state, ids)
        yield ScorePart(ids, matrix @ flatten((gradients[name] for name in vectors), batched=True).T)
