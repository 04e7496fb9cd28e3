"""Gauss-Newton matrices and gradients by brute force, and a curvature made of the first, for small classifiers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd import Queries
from retrograd.params import flatten, unflatten
from retrograd.trajectory import TrainingState


def dense_gauss_newton(run, state: TrainingState, ids: Tensor | None = None) -> Tensor:
    """Mean over examples of Jᵀ (diag p − p pᵀ) J, with the Jacobian of the logits by brute force."""
    inputs, _ = run.examples.batch(run.examples.ids if ids is None else ids)
    model = run.update_map.model

    def logits(vector: Tensor) -> Tensor:
        return torch.func.functional_call(model, unflatten(vector, state.params), (inputs,))

    point = flatten(state.params.values())
    jacobian, found = torch.func.jacrev(logits)(point), logits(point).softmax(-1)
    middle = torch.diag_embed(found) - found[:, :, None] * found[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / len(inputs)


@dataclass(frozen=True)
class DenseOperator:
    matrix: Tensor

    def apply(self, function: Callable[[Tensor, float], Tensor], vectors: dict) -> dict:
        values, basis = torch.linalg.eigh(self.matrix)
        values = values.clamp(min=0)
        flat = flatten(vectors.values(), batched=True) @ basis * function(values, values.mean().item()) @ basis.T
        parts = [unflatten(row, {name: leaf[0] for name, leaf in vectors.items()}) for row in flat]
        return {name: torch.stack([part[name] for part in parts]) for name in vectors}


@dataclass(frozen=True)
class Dense:
    """The exact Gauss-Newton matrix, averaged over states."""

    def fit(self, run, states: Sequence[TrainingState], *, seed: int = 0, ids=None, scale=None) -> DenseOperator:
        matrix = torch.stack([dense_gauss_newton(run, state, ids) for state in states]).mean(0)
        if scale is not None:
            flat = flatten(scale.values())
            matrix = flat[:, None] * matrix * flat
        return DenseOperator(matrix)


def example_gradients(run, state: TrainingState) -> Tensor:
    rows = []
    for number in run.examples.ids:
        params = {name: leaf.clone().requires_grad_() for name, leaf in state.params.items()}
        loss = run.update_map.losses(TrainingState(params, {}, {}, 0), run.examples.batch(number[None]))[0]
        rows.append(flatten(torch.autograd.grad(loss, list(params.values()))))
    return torch.stack(rows)


def query_gradients(run, queries) -> Tensor:
    return flatten(Queries(queries).gradients(run, run.final_state).params.values(), batched=True)
