"""The update map of one training step, s_{t+1} = Φ(s_t, u_t), and its Jacobian products.

One step, with U the optimizer (elementwise) and c the clipping of the gradient's global norm:

    g   = ∇_θ L,   L = Σ_i w_i ℓ_i(θ, b) / B          the batch gradient, b = buffers
    g'  = c(g) = min(1, c / (‖g‖ + 1e-6)) · g
    (θ', o') = U(θ, o, g', h)                           o = optimizer slots, h = hyperparameters
    b'  = what the forward pass leaves in the buffers

**Pullback** of costates (λ_θ', λ_o', λ_b') with A = ∂s'/∂s:

    1. (λ_θ', λ_o') → (a_θ, λ_o, γ')    by U's Jacobian, which is a few numbers a coordinate (see `elementwise_jacobian`)
    2. γ = cᵀ γ' = s γ' − s / (‖g‖ + 1e-6) · ⟨g, γ'⟩ g / ‖g‖  when clipping is active, else γ'
    3. one reverse pass over  ψ = ⟨g(θ, b, w), γ⟩ + ⟨b'(θ, b), λ_b'⟩  gives
           λ_θ = a_θ + ∂ψ/∂θ (the Hessian product),   λ_b = ∂ψ/∂b,   ∂ψ/∂w_i = ⟨∇ℓ_i, γ⟩ / B

The last is the score of example i at this step: no per-example gradient is formed. The graph of g is built once and
shared by all costates; only the reverse pass is repeated, either for all of them at once (route ``"batched"``) or one
after the other (route ``"loop"``). With ``curvature="gauss_newton"`` another graph gives the derivatives of ψ, with the
Gauss-Newton matrix for the Hessian (see ``gauss_newton_graph.py``); all else is the same.

Assumptions: the loss can be differentiated twice. Where it cannot (ReLU at 0, ties of max-pooling, √v at v = 0)
autograd's one-sided choice is taken. Cost: building the graph about 1.5 plain training steps a batch of costates, then
1.3 to 2 a costate where compute binds, less where the plain step is bound by overhead. Memory: activations of one
batch, on the batched route times the costates of a slice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.errors import InputError
from retrograd.params import Params, Slots, batched_inner, count
from retrograd.task import BoundModel, CoupledTask, Task, weighted_loss
from retrograd.trajectory.gauss_newton_graph import GaussNewtonGraph
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.rule_jacobian import Jacobian, combine, elementwise_jacobian, share
from retrograd.trajectory.state import StateVectors, StepInputs, TrainingState, map_batch
from retrograd.trajectory.step_graph import Route, StepCurvature, StepGraph
from retrograd.update_rules import Hyper, UpdateRule

_SCALARS_AT_ONCE = 1 << 21  # costates are reversed in slices of so many scalars: temporary memory then stays warm
_CLIP_GUARD = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


@dataclass(frozen=True)
class Pullback:
    """What one step of the adjoint gives: costates of s_t, and the scores ∂⟨λ, s_{t+1}⟩/∂w of the batch, ``[query, batch]``."""

    costates: StateVectors
    scores: Float[Tensor, "query batch"]


class UpdateMap:
    """Φ: one training step as a pure function of state and inputs, with pushforward and pullback.

    Args:
        model: the user's module. Its own parameters are never touched by this class.
        task: what is trained.
        rule: the optimizer's update rule.
        groups: names of the parameters of each optimizer group; together all trainable parameters.
        clip_norm: the global norm to which gradients are clipped, or None.
        evaluation_modules: names of submodules that stay in evaluation mode during training (frozen batch norm).

    >>> from retrograd.task import Regression
    >>> from retrograd.update_rules import SGD
    >>> model = nn.Linear(1, 1, bias=False)
    >>> step = UpdateMap(model, Regression(), SGD(), groups=(("weight",),))
    >>> state = TrainingState({"weight": torch.tensor([[1.0]])}, {}, {}, 0)
    >>> batch = (torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    >>> hyper = {"learning_rate": 0.25, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    >>> inputs = StepInputs(torch.tensor([0]), None, (hyper,), batch, seed=0)
    >>> step(state, inputs).params["weight"].item()               # 1 - 0.25 * 2 * (1 - 3)
    2.0
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | CoupledTask,
        rule: UpdateRule,
        groups: Sequence[Sequence[str]],
        clip_norm: float | None = None,
        evaluation_modules: Sequence[str] = (),
    ):
        self.model, self.task, self.rule, self.clip_norm = model, task, rule, clip_norm
        self.groups = tuple(tuple(group) for group in groups)
        self.evaluation_modules = tuple(evaluation_modules)
        self._group_of = {name: index for index, group in enumerate(self.groups) for name in group}
        # The norm of a gradient depends on the order of its parts, by rounding: the module's order is the order everywhere.
        self.names = tuple(name for name, _ in model.named_parameters() if name in self._group_of)
        self._bound = BoundModel(model)
        self._used: frozenset[str] | None = None  # parameters that get a gradient at all

    # ------------------------------------------------------------------ the map itself

    def __call__(self, state: TrainingState, inputs: StepInputs) -> TrainingState:
        """Return s_{t+1}; bit for bit what an ordinary loop of torch gives on the same machine."""
        params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        buffers = {name: leaf.detach().clone() for name, leaf in state.buffers.items()}
        loss = self._loss(params, buffers, inputs, inputs.weights)
        names = list(params)
        found = torch.autograd.grad(loss, [params[name] for name in names], allow_unused=True)
        grads = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
        with torch.no_grad():
            params, slots = self.update(state.params, state.slots, self._clip(grads), inputs.hyper)
        return TrainingState(params, slots, {name: leaf.detach() for name, leaf in buffers.items()}, state.step + 1)

    def many(
        self, states: TrainingState, inputs: StepInputs, weights: Float[Tensor, "model batch"], own_batches: bool = False
    ) -> TrainingState:
        """Make the same step with many models at once: every tensor of ``states`` has a leading axis ``model``.

        Args:
            states: one state for each model.
            inputs: the inputs of the step; its random numbers are shared by all models.
            weights: example weights of each model.
            own_batches: the batch's tensors have a leading axis ``model``, too, instead of being shared.
        """
        if self._used is None:
            one = states.map(lambda leaf: leaf[0])
            batch = map_batch(lambda leaf: leaf[0], inputs.batch) if own_batches else inputs.batch
            self._used = frozenset(StepGraph(self._loss, one, replace(inputs, batch=batch, weights=weights[0])).grads)
        used = self._used

        def step(params: Params, slots: Slots, buffers: Params, weights: Tensor, batch: object) -> tuple[Params, Slots, Params]:
            def loss(params: Params) -> tuple[Tensor, Params]:
                written = {name: leaf.clone() for name, leaf in buffers.items()}
                return self._loss(params, written, replace(inputs, batch=batch), weights), written

            grads, written = torch.func.grad(loss, has_aux=True)(params)
            grads = self._clip({name: leaf for name, leaf in grads.items() if name in used})
            return *self.update(params, slots, grads, inputs.hyper), written

        axes = (0, 0, 0, 0, 0 if own_batches else None)
        stepped = torch.func.vmap(step, axes, randomness="same")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batched form
            new = stepped(states.params, states.slots, states.buffers, weights, inputs.batch)
        return TrainingState(*new, states.step + 1)

    def update(self, params: Params, slots: Slots, grads: Params, hyper: tuple[Hyper, ...]) -> tuple[Params, Slots]:
        """Apply the update rule U. A parameter without gradient stays as it is, as in torch."""
        new_params, new_slots = dict(params), {slot: dict(leaves) for slot, leaves in slots.items()}
        for name, grad in grads.items():
            own = {slot: slots[slot][name] for slot in self.rule.slots}
            new_params[name], changed = self.rule.apply(params[name], own, grad, hyper[self._group_of[name]])
            for slot, leaf in changed.items():
                new_slots[slot][name] = leaf
        return new_params, new_slots

    def group_of(self, name: str) -> int:
        """Return the index of the optimizer group that a parameter belongs to."""
        return self._group_of[name]

    def measurements(self, state: TrainingState, batch: object) -> Float[Tensor, " query"]:
        """Evaluate the task's measurements at ``state``, in evaluation mode; differentiable in the state's tensors."""
        with evaluation_mode(self.model), torch.enable_grad():
            return self._bound(self.task.measurements, {**state.params, **state.buffers}, batch)

    def losses(self, state: TrainingState, batch: object) -> Float[Tensor, " batch"]:
        """Per-example losses at ``state``, in evaluation mode; differentiable in the state's tensors."""
        if isinstance(self.task, CoupledTask):
            raise InputError(f"{type(self.task).__name__} couples the examples of a batch: it has no per-example losses.")
        with evaluation_mode(self.model), torch.enable_grad():
            return self._bound(self.task.losses, {**state.params, **state.buffers}, batch)

    # ------------------------------------------------------------------ its Jacobian products

    def pullback(
        self,
        state: TrainingState,
        inputs: StepInputs,
        costates: StateVectors,
        route: Route = "batched",
        out: StateVectors | None = None,
        curvature: StepCurvature = "hessian",
    ) -> Pullback:
        """Pull costates of s_{t+1} back to s_t: ``Aᵀ λ``, and the scores ``⟨λ, ∂Φ/∂w_i⟩`` of the batch's examples.

        Args:
            state: s_t.
            inputs: u_t.
            costates: λ_{t+1}, a leading axis ``query`` on every leaf.
            route: ``"batched"`` reverses many costates at once, ``"loop"`` one after the other.
            out: where to write the costates of s_t; may be ``costates`` itself, which saves memory and much time.
            curvature: ``"gauss_newton"`` puts the batch's Gauss-Newton matrix in the place of its Hessian.

        Raises:
            NoSecondDerivative: a kernel of the model can be differentiated only once.
            InputError: the task does not say what a Gauss-Newton matrix needs to know (see `SplitTask`).
        """
        costates = self._with_all_slots(costates)
        graph = self._graph(state, inputs, curvature)
        jacobians = self._rule_jacobians(state, graph.grads, inputs)
        target = costates.map(torch.empty_like) if out is None else out
        scores = graph.weights.new_zeros(len(costates), len(graph.weights))
        size = max(1, min(len(costates), _SCALARS_AT_ONCE // count(state.params)))
        for start in range(0, len(costates), size):
            rows = slice(start, start + size)
            part = costates[rows]
            carried, gamma = self._pull_through_rule(part, jacobians, graph.grads)
            last = start + size >= len(costates)
            products, own_scores = graph.reverse(gamma, part.buffers, route, retain_graph=not last)
            if own_scores is None:
                raise InputError(f"the loss of {type(self.task).__name__} does not depend on the example weights it is given.")
            scores[rows] = own_scores
            for name, direct in carried.params.items():
                product = products[name]
                torch.add(direct, 0.0 if product is None else product, out=target.params[name][rows])
            for slot, leaves in carried.slots.items():
                for name, leaf in leaves.items():
                    target.slots[slot][name][rows] = leaf
            for name, direct in part.buffers.items():
                product = products[f"buffers/{name}"]
                # A buffer that the step writes gets all of its costate from the reverse pass, any other keeps what it had.
                kept = torch.zeros_like(direct) if name in graph.written else direct
                target.buffers[name][rows] = kept if product is None else kept + product
        return Pullback(target, scores)

    def pushforward(
        self,
        state: TrainingState,
        inputs: StepInputs,
        tangents: StateVectors,
        weight_tangents: Float[Tensor, "tangent batch"] | None = None,
    ) -> StateVectors:
        """Push tangents of s_t (and of the example weights) forward to s_{t+1}: ``A δ + B v``.

        Args:
            state: s_t.
            inputs: u_t.
            tangents: δ_t, a leading axis ``tangent`` on every leaf.
            weight_tangents: v, the direction in which the example weights of this batch move.
        """
        tangents = self._with_all_slots(tangents)
        ones = torch.ones(len(inputs.example_ids), dtype=_dtype(state.params))
        weights = ones if inputs.weights is None else inputs.weights.to(ones)
        moves = weights.new_zeros(len(tangents), len(weights)) if weight_tangents is None else weight_tangents.to(weights)

        def gradient(params: Params, buffers: Params, weights: Tensor) -> tuple[Params, Params]:
            def loss(params: Params) -> tuple[Tensor, Params]:
                written = {name: leaf.clone() for name, leaf in {**state.buffers, **buffers}.items()}
                with twice_differentiable(own_functions=False):
                    value = self._loss(params, written, inputs, weights)
                return value, {name: written[name] for name in buffers}

            return torch.func.grad(loss, has_aux=True)(params)

        def push(params: Params, buffers: Params, weights: Tensor) -> tuple[Params, Params]:
            moving = {name: state.buffers[name] for name in buffers}
            primals = (state.params, moving, weights_now)
            return torch.func.jvp(gradient, primals, (params, buffers, weights))[1]

        weights_now = weights
        grad_tangents, buffer_tangents = torch.func.vmap(push, randomness="same")(tangents.params, tangents.buffers, moves)
        used = StepGraph(self._loss, state, inputs).grads
        grads = {name: leaf.detach() for name, leaf in used.items()}
        return self._push_through_rule(state, inputs, tangents, grads, grad_tangents, buffer_tangents)

    # ------------------------------------------------------------------ the rule's and the clipping's share

    def _pull_through_rule(
        self, costates: StateVectors, jacobians: dict[str, Jacobian], grads: Params
    ) -> tuple[StateVectors, Params]:
        """Pull back through U and the clipping: (λ_θ', λ_o') → (a_θ, λ_o) and γ."""
        params, slots, gamma = {}, {slot: {} for slot in costates.slots}, {}
        for name, leaf in costates.params.items():
            outgoing = {"parameter": leaf, **{slot: leaves[name] for slot, leaves in costates.slots.items()}}
            if name not in jacobians:
                pulled = outgoing
            else:
                pulled = {}
                terms = {
                    source: [(jacobians[name][target][source], vector) for target, vector in outgoing.items()]
                    for source in (*outgoing, "gradient")
                }
                gamma[name] = combine(terms["gradient"], leaf)
                for source in outgoing:
                    ratio = None if source == "parameter" else share(terms[source], terms["gradient"])
                    pulled[source] = combine(terms[source], leaf) if ratio is None else gamma[name] * ratio
                    if any(pulled[source] is vector for other, vector in outgoing.items() if other != source):
                        pulled[source] = pulled[source].clone()  # in place, the other leaf may be overwritten first
            params[name] = pulled["parameter"]
            for slot in costates.slots:
                slots[slot][name] = pulled[slot]
        return StateVectors(params, slots, {}), self._clip_derivative(grads, gamma)

    def _push_through_rule(
        self,
        state: TrainingState,
        inputs: StepInputs,
        tangents: StateVectors,
        grads: Params,
        grad_tangents: Params,
        buffer_tangents: Params,
    ) -> StateVectors:
        moved = self._clip_derivative(grads, {name: grad_tangents[name] for name in grads})
        jacobians = self._rule_jacobians(state, grads, inputs)
        params, slots = dict(tangents.params), {slot: dict(leaves) for slot, leaves in tangents.slots.items()}
        for name, jacobian in jacobians.items():
            incoming = {"parameter": tangents.params[name], "gradient": moved[name]}
            incoming |= {slot: leaves[name] for slot, leaves in tangents.slots.items()}
            pushed = {}
            for target, row in jacobian.items():
                pushed[target] = combine([(row[source], vector) for source, vector in incoming.items()], tangents.params[name])
            params[name] = pushed["parameter"]
            for slot in slots:
                slots[slot][name] = pushed[slot]
        return StateVectors(params, slots, buffer_tangents)

    def _rule_jacobians(self, state: TrainingState, grads: Params, inputs: StepInputs) -> dict[str, Jacobian]:
        """The Jacobian of U for each parameter that has a gradient, taken at the clipped gradient."""
        jacobians = {}
        for name, grad in self._clip({name: leaf.detach() for name, leaf in grads.items()}).items():
            own = {slot: state.slots[slot][name] for slot in self.rule.slots}
            jacobians[name] = elementwise_jacobian(self.rule, state.params[name], own, grad, inputs.hyper[self._group_of[name]])
        return jacobians

    def _with_all_slots(self, vectors: StateVectors) -> StateVectors:
        """Fill slots that are left out with zeros."""
        missing = [slot for slot in self.rule.slots if slot not in vectors.slots]
        zeros = {slot: {name: torch.zeros_like(leaf) for name, leaf in vectors.params.items()} for slot in missing}
        return replace(vectors, slots={**vectors.slots, **zeros}) if missing else vectors

    def _clip(self, grads: Params) -> Params:
        if self.clip_norm is None or not grads:
            return grads
        scale = torch.clamp(self.clip_norm / (_global_norm(grads) + _CLIP_GUARD), max=1.0)
        return {name: leaf * scale for name, leaf in grads.items()}

    def _clip_derivative(self, grads: Params, vectors: Params) -> Params:
        """Multiply by ∂g'/∂g, which is symmetric: the same product serves tangents and costates."""
        if self.clip_norm is None or not grads:
            return vectors
        grads = {name: leaf.detach() for name, leaf in grads.items()}
        norm = _global_norm(grads)
        scale = self.clip_norm / (norm + _CLIP_GUARD)
        if scale >= 1:
            return vectors
        along = batched_inner(vectors, grads) * (scale / (norm * (norm + _CLIP_GUARD)))
        return {name: scale * leaf - along.view(-1, *[1] * grads[name].dim()) * grads[name] for name, leaf in vectors.items()}

    # ------------------------------------------------------------------ running the user's code

    def _graph(self, state: TrainingState, inputs: StepInputs, curvature: StepCurvature) -> StepGraph | GaussNewtonGraph:
        if curvature == "hessian":
            return StepGraph(self._loss, state, inputs)
        return GaussNewtonGraph(self.task, self._run, state, inputs)

    def _loss(self, params: Params, buffers: Params, inputs: StepInputs, weights: Tensor | None) -> Tensor:
        """Evaluate the loss of the step in training mode, with its own random numbers; ``buffers`` is written to."""

        def loss(model: nn.Module) -> Tensor:
            return weighted_loss(self.task, model, inputs.batch, weights, len(inputs.example_ids))

        return self._run(loss, params, buffers, inputs)

    def _run(self, function: Callable[[nn.Module], Any], params: Params, buffers: Params, inputs: StepInputs) -> Any:
        """Evaluate ``function(model)`` as a step does: in training mode, with its random numbers, writing to ``buffers``."""
        tensors = {**params, **buffers}
        with self._training_mode(), torch.enable_grad(), seeded(inputs.seed, params):
            value = self._bound(function, tensors)
        for name in buffers:
            buffers[name] = tensors[name]
        return value

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        with _keeping_modes(self.model):
            self.model.train()
            for name in self.evaluation_modules:
                self.model.get_submodule(name).training = False
            yield


@contextmanager
def seeded(seed: int, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw this step's random numbers from ``seed`` and give the global generators back as they were."""
    device = next(iter(params.values())).device
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back as they were."""
    with _keeping_modes(model):
        model.eval()
        yield


@contextmanager
def _keeping_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _global_norm(grads: Params) -> Tensor:
    # The same operations as torch.nn.utils.clip_grad_norm_, so that a replay has the same bits.
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in grads.values()]))


def _dtype(params: Params) -> torch.dtype:
    return next(iter(params.values())).dtype
