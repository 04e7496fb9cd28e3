"""The graph of one step's gradient, and its reversal: what the Jacobian products of `UpdateMap` share.

With g the batch gradient, b' the buffers after the step, θ, b, w its parameters, buffers and example weights,

    ψ = ⟨g, γ⟩ + ⟨b', λ_b'⟩  ↦  ∂ψ/∂θ, ∂ψ/∂b, ∂ψ/∂w, and by whatever else went into the loss

`StepGraph` reverses all of it, so that ∂g/∂θ is the Hessian of the batch's loss; `GaussNewtonGraph` (in
``gauss_newton_graph.py``) gives the same three with the Gauss-Newton matrix in its place.

Assumptions: the loss can be differentiated twice. Cost: about 1.5 training steps for the graph, 1.3 to 2 a costate.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from retrograd.errors import NonFinite, NoSecondDerivative
from retrograd.params import Params
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.state import StepInputs, TrainingState

Route = Literal["batched", "loop"]

StepCurvature = Literal["hessian", "gauss_newton"]
"""What stands for the derivative of the batch gradient by the parameters: the Hessian itself, or the Gauss-Newton matrix."""


GradientOf = Callable[[Params, Params, StepInputs, Tensor | None, bool], tuple[Params, Tensor]]
"""Maps (parameters, buffers, inputs, weights, create_graph) to a step's gradient and loss, as `StepGradient` does."""

Products = tuple[dict[str, Tensor | None], Tensor | None]
"""∂ψ/∂θ and ∂ψ/∂b under the names of parameters and ``buffers/…``, and ∂ψ/∂w; None where there is no dependence.

The derivatives by other inputs follow under their names (see `with_leaves`)."""


class StepLeaves:
    """What a step's derivatives are taken by: parameters, buffers and example weights, as leaves of a new graph.

    ``buffers_out`` are to be written by the forward pass. `written` then says which ones it wrote.
    """

    def __init__(self, state: TrainingState, inputs: StepInputs):
        self.step = state.step
        self.params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        self.buffers_in = {name: leaf.detach().requires_grad_(leaf.is_floating_point()) for name, leaf in state.buffers.items()}
        self.buffers_out = {name: leaf.clone() for name, leaf in self.buffers_in.items()}
        some = next(iter(state.params.values()))
        size = len(inputs.example_ids)
        given = torch.ones(size, dtype=some.dtype) if inputs.weights is None else inputs.weights.to(some.dtype)
        self.weights = given.to(some.device).detach().requires_grad_()
        self._copies = dict(self.buffers_out)
        self._versions = {name: leaf._version for name, leaf in self._copies.items()}
        self._origins = {name: leaf.grad_fn for name, leaf in self._copies.items()}

    def refuse_non_finite(self, loss: Tensor) -> None:
        """Refuse a step whose loss is NaN or infinite."""
        if not torch.isfinite(loss.detach()):
            raise NonFinite(f"the loss of step {self.step} is {loss.item()}; a derivative through it means nothing.")

    def written(self) -> set[str]:
        """Return the names of the buffers that the forward pass wrote.

        Raises:
            NoSecondDerivative: one was written where autograd does not see it.
        """
        written = {
            name
            for name, leaf in self.buffers_out.items()
            if leaf is not self._copies[name] or leaf._version != self._versions[name]
        }
        for name in written:
            if self.buffers_out[name].grad_fn is not None and self.buffers_out[name].grad_fn is self._origins[name]:
                raise NoSecondDerivative(
                    f"buffer {name} is written to under torch.no_grad() or by a kernel that autograd does not see, so its "
                    "derivative is lost. Update it in the graph (plain arithmetic on features that are not detached), or, if "
                    "the update is meant to be a constant, detach its sources and not the buffer."
                )
        return written

    def sources(self, buffers: Mapping[str, object]) -> dict[str, Tensor]:
        """Return all parameters, and the named buffers as ``buffers/…``."""
        return {**self.params, **{f"buffers/{name}": self.buffers_in[name] for name in buffers}}


class StepGraph:
    """The graph of the batch gradient at one state, to be reversed once for every costate.

    Args:
        gradient_of: gives the gradient.
        state: s_t.
        inputs: u_t.
        others: leaves among ``inputs`` to differentiate by as well, by name.
        shared: whether it will be reversed for more than one costate.
        own_functions: whether kernels of our own may be used (see `twice_differentiable`).

    Attributes:
        grads: the batch gradient, of the parameters that have one.
        weights: the weights of the batch's examples.
        written: names of the buffers that the step writes.
    """

    def __init__(
        self,
        gradient_of: GradientOf,
        state: TrainingState,
        inputs: StepInputs,
        others: Mapping[str, Tensor] | None = None,
        shared: bool = True,
        own_functions: bool = True,
    ):
        self._leaves, self._others = StepLeaves(state, inputs), dict(others or {})
        leaves, self.weights = self._leaves, self._leaves.weights
        with twice_differentiable(own_functions, shared):
            self.grads, loss = gradient_of(leaves.params, leaves.buffers_out, inputs, leaves.weights, True)
        leaves.refuse_non_finite(loss)
        self.written = leaves.written()
        refuse_once_differentiable(list(self.grads.values()))

    def reverse(self, gamma: Params, buffers: Params, route: Route, retain_graph: bool) -> Products:
        """Return the derivatives of ψ for all costates at once.

        Args:
            gamma: γ, of the parameters in ``grads``, a leading axis ``query`` on every leaf.
            buffers: λ_b' of the buffers that are carried; those that the step does not write play no part in ψ.
            route: how the graph is reversed.
            retain_graph: whether it will be reversed again.
        """
        written = [name for name in buffers if name in self.written]
        outputs = [*self.grads.values(), *(self._leaves.buffers_out[name] for name in written)]
        sources = {**self._leaves.sources(buffers), **self._others}
        cotangents = [*gamma.values(), *(buffers[name] for name in written)]
        found = reverse_graph(outputs, [*sources.values(), self.weights], cotangents, route, retain_graph)
        return dict(zip(sources, found, strict=False)), found[-1]


def refuse_once_differentiable(outputs: list[Tensor]) -> None:
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
