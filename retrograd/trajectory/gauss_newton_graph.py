"""The graph of one step's gradient, reversed with the Gauss-Newton matrix in place of the Hessian.

    f = f(θ, b)                                     outputs of the batch, b = buffers
    g = Jᵀ r,   r = ∂L/∂f,   L = Σ_i w_i ℓ_i(f_i) / B,   J = ∂f/∂θ        the batch gradient

The Hessian is Jᵀ (∂r/∂f) J, which is the Gauss-Newton matrix G = (1/B) Σ_i w_i J_iᵀ H_i J_i with H_i = ∂²ℓ_i/∂f_i², and a rest
Σ r ∂²f/∂θ² that comes of the model's own curvature. Here the rest is left out: J counts as a constant. Then, in the
terms of ``step_graph.py``, ψ = ⟨r(f(θ, b), w), u⟩ + ⟨b'(θ, b), λ_b'⟩ with u = J γ, and

    ∂ψ/∂(θ, b) = (∂f/∂(θ, b))ᵀ c + (∂b'/∂(θ, b))ᵀ λ_b',   c = (∂r/∂f) u,        ∂ψ/∂w_i = ⟨∂ℓ_i/∂f_i, u_i⟩ / B

for each costate: one derivative forward to the outputs, one of r there, one ordinary reverse pass. The first is a reverse
pass, too, over the graph of v ↦ Jᵀ v, which is linear in v; with v = r that graph gives g on the way.

What the step writes to buffers (running statistics) is differentiated exactly, and so are the scores for given costates;
buffers that outputs are computed from get the Gauss-Newton term like parameters do.

Assumptions: all that the losses know of the parameters goes through the outputs (`SplitTask`; checked at every step). Where
the losses are convex in the outputs G has no negative eigenvalue, so with a small enough learning rate no step of plain
gradient descent makes a costate longer: that is why it helps where training is rough. For a model that is linear in its
parameters it is the Hessian. Cost: for a graph of the gradient and a check of the losses about 2 plain training steps,
1 to 1.5 for each costate. Memory: [query, batch, outputs] numbers beside the activations; on route ``"loop"`` of one query.

References: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent"; Martens (2020), "New
insights and perspectives on the natural gradient method".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.params import Params
from retrograd.task import AnyTask, check_split, split_task, weighted_mean
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.state import StepInputs, TrainingState
from retrograd.trajectory.step_graph import Products, Route, StepLeaves, refuse_once_differentiable, reverse_graph

Run = Callable[[Callable[[nn.Module], Any], Params, Params, StepInputs], Any]
"""Maps (function, parameters, buffers, inputs) to ``function(model)`` in the mode and with the random numbers of a step."""


class GaussNewtonGraph:
    """The graph of the batch gradient at one state, to be reversed for costates with the Gauss-Newton matrix.

    Args:
        task: must be a `SplitTask`.
        run: runs the model.
        state: s_t.
        inputs: u_t.

    Attributes:
        grads: the batch gradient, of the parameters that have one.
        weights: the weights of the batch's examples.
        written: names of the buffers that the step writes.

    Raises:
        InputError: the task does not say what its outputs are, or gives other losses for them.
        NoSecondDerivative: a kernel of the model can be differentiated only once.
    """

    def __init__(self, task: AnyTask, run: Run, state: TrainingState, inputs: StepInputs):
        split, size = split_task(task), len(inputs.example_ids)
        self._leaves = leaves = StepLeaves(state, inputs)
        self.weights = leaves.weights

        def both(model: nn.Module) -> tuple[Tensor, Tensor]:
            outputs = split.outputs(model, inputs.batch)
            return outputs, split.losses_of(outputs, inputs.batch)

        def losses(model: nn.Module) -> Tensor:
            with torch.no_grad():
                return split.losses(model, inputs.batch)

        with twice_differentiable():
            self._outputs, found = run(both, leaves.params, leaves.buffers_out, inputs)
            loss = weighted_mean(found, leaves.weights, size, f"{type(task).__name__}.losses_of")
            leaves.refuse_non_finite(loss)
            buffers = {name: leaf.clone() for name, leaf in state.buffers.items()}
            check_split(split, run(losses, state.params, buffers, inputs), found)
            (self._slope,) = torch.autograd.grad(loss, self._outputs, create_graph=True)
            self._along = self._slope.detach().requires_grad_()
            parameters = list(leaves.params.values())
            grads = torch.autograd.grad(self._outputs, parameters, self._along, create_graph=True, allow_unused=True)
        self.grads = {name: grad for name, grad in zip(leaves.params, grads, strict=True) if grad is not None}
        self.written = leaves.written()
        refuse_once_differentiable([*self.grads.values(), self._slope])

    def reverse(self, gamma: Params, buffers: Params, route: Route, retain_graph: bool) -> Products:
        """Return the derivatives of ψ for all costates at once, as `StepGraph.reverse` does."""
        if route == "batched":
            return self._reverse(gamma, buffers, route, retain_graph)
        # One costate goes all the way before the next: the outputs of language models are too large to be kept for all.
        number = len(next(iter(gamma.values())))
        products: dict[str, Tensor | None] = {}
        scores = self.weights.new_zeros(number, len(self.weights))
        for index in range(number):
            row = slice(index, index + 1)
            own_gamma = {name: leaf[row] for name, leaf in gamma.items()}
            own_buffers = {name: leaf[row] for name, leaf in buffers.items()}
            found, own_scores = self._reverse(own_gamma, own_buffers, route, retain_graph or index + 1 < number)
            scores[row] = 0.0 if own_scores is None else own_scores
            for name, product in found.items():
                if products.get(name) is None:
                    products[name] = None if product is None else product.new_zeros(number, *product.shape[1:])
                if product is not None:
                    products[name][row] = product  # type: ignore[index]
        return products, scores

    def _reverse(self, gamma: Params, buffers: Params, route: Route, retain_graph: bool) -> Products:
        (moved,) = reverse_graph(list(self.grads.values()), [self._along], list(gamma.values()), route, retain_graph)
        assert moved is not None  # Jᵀ v depends on v
        curved, scores = reverse_graph([self._slope], [self._outputs, self.weights], [moved], route, retain_graph)
        written = [name for name in buffers if name in self.written]
        ends = [self._leaves.buffers_out[name] for name in written]
        cotangents = [buffers[name] for name in written]
        if curved is not None:  # else the losses are linear in the outputs
            ends, cotangents = [self._outputs, *ends], [curved, *cotangents]
        sources = self._leaves.sources(buffers)
        if not ends:
            return dict.fromkeys(sources), scores
        found = reverse_graph(ends, list(sources.values()), cotangents, route, retain_graph)
        return dict(zip(sources, found, strict=True)), scores
