"""The graph of one step's gradient, and its reversal: what the Jacobian products of `UpdateMap` share."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from retrograd.errors import NonFinite, NoSecondDerivative
from retrograd.params import Params
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.state import StepInputs, TrainingState

Route = Literal["batched", "loop"]


LossOf = Callable[[Params, Params, StepInputs, Tensor | None], Tensor]
"""Maps (parameters, buffers, inputs, weights) to the loss of a step; the buffers are written to as the forward pass does."""


class StepGraph:
    """The graph of the batch gradient at one state, to be reversed once for every costate."""

    def __init__(self, loss_of: LossOf, state: TrainingState, inputs: StepInputs):
        self.params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        self.buffers_in = {name: leaf.detach().requires_grad_(leaf.is_floating_point()) for name, leaf in state.buffers.items()}
        self.buffers_out = {name: leaf.clone() for name, leaf in self.buffers_in.items()}
        copies = dict(self.buffers_out)
        some = next(iter(state.params.values()))
        size = len(inputs.example_ids)
        given = torch.ones(size, dtype=some.dtype) if inputs.weights is None else inputs.weights.to(some.dtype)
        self.weights = given.to(some.device).detach().requires_grad_()
        origins = {name: leaf.grad_fn for name, leaf in copies.items()}
        versions = {name: leaf._version for name, leaf in copies.items()}
        with twice_differentiable():
            loss = loss_of(self.params, self.buffers_out, inputs, self.weights)
            if not torch.isfinite(loss.detach()):
                raise NonFinite(f"the loss of step {state.step} is {loss.item()}; a derivative through it means nothing.")
            found = torch.autograd.grad(loss, list(self.params.values()), create_graph=True, allow_unused=True)
        self.grads = {name: grad for name, grad in zip(self.params, found, strict=True) if grad is not None}
        self.written = {
            name for name, leaf in self.buffers_out.items() if leaf is not copies[name] or leaf._version != versions[name]
        }
        for name in self.written:
            if self.buffers_out[name].grad_fn is not None and self.buffers_out[name].grad_fn is origins[name]:
                raise NoSecondDerivative(
                    f"buffer {name} is written to under torch.no_grad() or by a kernel that autograd does not see, so its "
                    "derivative is lost. Update it in the graph (plain arithmetic on features that are not detached), or, if "
                    "the update is meant to be a constant, detach its sources and not the buffer."
                )
        _refuse_once_differentiable(list(self.grads.values()))


def _refuse_once_differentiable(outputs: list[Tensor]) -> None:
    """Look for the dead ends that ``once_differentiable`` leaves: a reverse pass for given inputs never steps on them."""
    seen: set = set()
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise NoSecondDerivative(
                "differentiating through training needs the second derivative of every operation of the model, and an "
                "autograd.Function of it is marked once_differentiable. Write its backward in differentiable torch operations."
            )
        stack.extend(next_node for next_node, _ in node.next_functions)


def reverse_graph(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], route: Route, retain_graph: bool
) -> list[Tensor | None]:
    """Vector-Jacobian products of all cotangents, stacked on a leading axis; None where there is no dependence."""
    reachable = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    outputs, cotangents = [output for output, _ in reachable], [cotangent for _, cotangent in reachable]
    try:
        if route == "batched":
            return list(
                torch.autograd.grad(
                    outputs, inputs, cotangents, allow_unused=True, is_grads_batched=True, retain_graph=retain_graph
                )
            )
        count = len(cotangents[0])
        products: list[Tensor | None] = [None] * len(inputs)
        for index in range(count):
            keep = retain_graph or index + 1 < count
            own = [leaf[index] for leaf in cotangents]
            found = torch.autograd.grad(outputs, inputs, own, allow_unused=True, retain_graph=keep)
            for position, product in enumerate(found):
                if product is not None:
                    if products[position] is None:
                        products[position] = product.new_zeros(count, *product.shape)
                    products[position][index] = product  # type: ignore[index]
        return products
    except RuntimeError as error:
        if "is not implemented" not in str(error) and "once_differentiable" not in str(error):
            raise
        raise NoSecondDerivative(
            f"differentiating through training needs the second derivative of every operation of the model, and one has "
            f"none: {error} Use the operation's plain form in the model (for attention, "
            "torch.nn.functional.scaled_dot_product_attention is switched to it by itself)."
        ) from error
