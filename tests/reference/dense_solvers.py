"""Solvers of the damped system written out with dense matrices, and the Hessian by brute force."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.params import flatten, unflatten
from retrograd.trajectory import TrainingState
from tests.reference.dense_influence import example_gradients


def dense_hessian(run, state: TrainingState, ids: Tensor | None = None) -> Tensor:
    batch = run.examples.batch(run.examples.ids if ids is None else ids)

    def loss(vector: Tensor) -> Tensor:
        params = unflatten(vector, state.params)
        return run.update_map.losses(TrainingState(params, state.slots, state.buffers, state.step), batch).mean()

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.hessian(loss)(flatten(state.params.values()))


def damped(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)


def neumann(matrices: list[Tensor], right: Tensor, step: float) -> Tensor:
    """x ← x + α (q − A_j x), from 0."""
    values = torch.zeros_like(right)
    for matrix in matrices:
        values = values + step * (right - values @ matrix)
    return values


def astra(
    matrices: list[Tensor], right: Tensor, preconditioner: Tensor, step: float, momentum: float, halve_every: int
) -> Tensor:
    """x ← x − α_k P⁻¹ (A_k x − q) + β (what it moved last), from P⁻¹ q."""
    inverse = torch.linalg.inv(preconditioner)
    values, move = right @ inverse, torch.zeros_like(right)
    for number, matrix in enumerate(matrices):
        move = momentum * move - step * 0.5 ** (number // halve_every) * (values @ matrix - right) @ inverse
        values = values + move
    return values


def datainf(run, state: TrainingState, right: Tensor, damping: float, weight: float, decay: float) -> Tensor:
    """The mean of the inverses of every example's own matrix, for each module's own parameters."""
    rows, found = example_gradients(run, state), torch.zeros_like(right)
    places = unflatten(torch.arange(rows.shape[1]), state.params)
    for module in dict.fromkeys(name.rpartition(".")[0] for name in places):
        index = torch.cat([place.flatten() for name, place in places.items() if name.rpartition(".")[0] == module])
        own = rows[:, index]
        shift = decay + damping * weight * own.square().sum(1).mean() / len(index)
        inverses = [torch.linalg.inv(damped(weight * torch.outer(row, row), shift)) for row in own]
        found[:, index] = right[:, index] @ torch.stack(inverses).mean(0)
    return found
