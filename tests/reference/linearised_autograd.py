"""Linearised training by brute force: the model f(θ_c) + J (θ − θ_c) with one vector of parameters, and autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.params import flatten, unflatten
from retrograd.task import BoundModel
from retrograd.trajectory import TrainingState, Trajectory


def tangent_kernel(function, vector: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """K(x, x') by torch.func, all Jacobians at once: ``[row, other, out, out]``."""
    each = torch.func.vmap(torch.func.jacrev(function), (None, 0))
    return torch.einsum("ncp,mdp->nmcd", each(vector, left), each(vector, right))


@dataclass(frozen=True)
class LinearModel:
    """f(θ_c) + J (θ − θ_c) in evaluation mode, of a run whose batches are (inputs, targets)."""

    run: Trajectory
    state: TrainingState

    def _outputs(self, vector: Tensor, batch) -> Tensor:
        update_map = self.run.update_map
        update_map.model.eval()
        tensors = {**unflatten(vector, self.state.params), **self.state.buffers}
        with sdpa_kernel(SDPBackend.MATH):
            return BoundModel(update_map.model)(lambda model: model(batch[0]), tensors)

    def __call__(self, vector: Tensor, batch) -> Tensor:
        at = flatten(self.state.params.values())
        jacobian = torch.func.jacrev(lambda point: self._outputs(point, batch))(at)
        return self._outputs(at, batch) + jacobian @ (vector - at)


def final_parameters(run: Trajectory, state: TrainingState, added: Tensor) -> Tensor:
    """Parameters at the end of linearised training by SGD, a differentiable function of what is ``added`` to the weights."""
    linear, task, vector, velocity = LinearModel(run, state), run.update_map.task, flatten(run.state(0).params.values()), None
    for step in range(len(run)):
        inputs, hyper = run.inputs(step), run.inputs(step).hyper[0]
        given = torch.ones(len(inputs.example_ids), dtype=torch.float64) if inputs.weights is None else inputs.weights
        shares = given + added[run.examples.rows(inputs.example_ids)]
        point = vector if vector.requires_grad else vector.requires_grad_()
        losses = task.losses_of(linear(point, inputs.batch), inputs.batch)
        loss = (shares * losses).sum() / len(shares)
        (grad,) = torch.autograd.grad(loss, point, create_graph=True)
        if run.update_map.clip_norm is not None:
            grad = grad * torch.clamp(run.update_map.clip_norm / (grad.norm() + 1e-6), max=1.0)
        grad = grad + hyper["weight_decay"] * vector
        if hyper["momentum"]:
            velocity = grad if velocity is None else hyper["momentum"] * velocity + (1 - hyper["dampening"]) * grad
            grad = grad + hyper["momentum"] * velocity if getattr(run.update_map.rule, "nesterov", False) else velocity
        vector = vector - hyper["learning_rate"] * grad
    return vector


def scores(run: Trajectory, state: TrainingState, queries) -> Tensor:
    """d measurement / d w by autograd through linearised training, ``[query, example]``."""
    added = torch.zeros(len(run.examples), dtype=torch.float64, requires_grad=True)
    linear, task = LinearModel(run, state), run.update_map.task
    outputs = linear(final_parameters(run, state, added), queries)

    class Given(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return outputs

    values = task.measurements(Given(), queries)
    return torch.stack([torch.autograd.grad(value, added, retain_graph=True)[0] for value in values])
