"""The update map of one training step, s_{t+1} = Φ(s_t, u_t), and its Jacobian products.

One step, with U the optimizer (elementwise) and c the clipping of the gradient's global norm:

    g   = ∇_θ L,   L = Σ_i w_i ℓ_i(θ, b) / B          the batch gradient, b = buffers
    g'  = c(g) = min(1, c / (‖g‖ + 1e-6)) · g
    (θ', o') = U(θ, o, g', h)                           o = optimizer slots, h = hyperparameters
    b'  = what the forward pass leaves in the buffers

**Pullback** of costates (λ_θ', λ_o', λ_b') with A = ∂s'/∂s:

    1. (λ_θ', λ_o') → (a_θ, λ_o, γ')    by U's Jacobian, which is a few numbers a coordinate (see `elementwise_jacobian`)
    2. γ = (∂g'/∂g)ᵀ γ'                 where clipping is active, else γ' (both in ``clipped_rule.py``)
    3. one reverse pass over  ψ = ⟨g(θ, b, w), γ⟩ + ⟨b'(θ, b), λ_b'⟩  gives
           λ_θ = a_θ + ∂ψ/∂θ (the Hessian product),   λ_b = ∂ψ/∂b,   ∂ψ/∂w_i = ⟨∇ℓ_i, γ⟩ / B

The last is the score of example i at this step: no per-example gradient is formed. The same pass gives the derivative by
anything else in the loss (meta-parameters, the batch itself), and U's and c's own derivatives those by h and by the norm. The
graph of g is built once and shared by all costates; only the reverse pass is repeated, either for all of them at once (route
``"batched"``) or one after the other (route ``"loop"``). With ``curvature="gauss_newton"`` another graph gives the derivatives
of ψ, with the Gauss-Newton matrix for the Hessian (see ``gauss_newton_graph.py``); all else is the same.

Assumptions: the loss can be differentiated twice. Where it cannot (ReLU at 0, ties of max-pooling, √v at v = 0)
autograd's one-sided choice is taken. Cost: building the graph about 1.5 plain training steps a batch of costates, then
1.3 to 2 a costate where compute binds, less where the plain step is bound by overhead. Memory: activations of one
batch, on the batched route times the costates of a slice.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.directions import Direction
from retrograd.errors import InputError
from retrograd.game import AnyGame
from retrograd.params import Params, Slots, count
from retrograd.task import AnyTask, BoundModel, CoupledTask, Meta, SplitTask
from retrograd.trajectory.clipped_rule import ClippedRule, LinearisedRule
from retrograd.trajectory.gauss_newton_graph import GaussNewtonGraph
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.modes import evaluation_mode, seeded, training_mode
from retrograd.trajectory.state import StateVectors, StepInputs, TrainingState, map_batch
from retrograd.trajectory.step_gradient import ONE, Losses, StepGradient, player_losses
from retrograd.trajectory.step_graph import Route, StepCurvature, StepGraph
from retrograd.trajectory.step_inputs import InputVectors, Rebuild, batch_names, input_leaves
from retrograd.update_rules import Hyper, UpdateRule

_COUNTERS = {"step", "synchronise", "has_previous"}  # hyperparameters with nothing between their values
_SCALARS_AT_ONCE = 1 << 21  # costates are reversed in slices of so many scalars: temporary memory then stays warm


@dataclass(frozen=True)
class Pullback:
    """What one step of the adjoint gives.

    Attributes:
        costates: λ_t, of s_t.
        scores: ∂⟨λ_{t+1}, s_{t+1}⟩/∂w of the batch, ``[query, batch]``.
        inputs: the same by other inputs of the step, as far as they were asked for.
    """

    costates: StateVectors
    scores: Float[Tensor, "query batch"]
    inputs: InputVectors = field(default_factory=InputVectors)


class UpdateMap:
    """Φ: one training step as a pure function of state and inputs, with pushforward and pullback.

    Args:
        model: the user's module. Its own parameters are never touched by this class.
        task: what is trained.
        rule: the optimizer's update rule.
        groups: names of the parameters of each optimizer group; together all trainable parameters.
        clip_norm: the global norm to which gradients are clipped, or None.
        direction: what takes the gradient's place in front of clipping and the rule (see `retrograd.directions`), or None.
        evaluation_modules: names of submodules that stay in evaluation mode during training (frozen batch norm).
        meta: the meta-module that the task's losses take, or None. Its parameters that require gradients are copied: they are
            the meta-parameters, constant along a run. All else of it is taken as it is, and never changed.

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
        task: AnyTask | AnyGame,
        rule: UpdateRule,
        groups: Sequence[Sequence[str]],
        clip_norm: float | None = None,
        evaluation_modules: Sequence[str] = (),
        meta: nn.Module | None = None,
        direction: Direction | None = None,
    ):
        self.model, self.task, self.rule, self.clip_norm = model, task, rule, clip_norm
        self.groups = tuple(tuple(group) for group in groups)
        self.evaluation_modules = tuple(evaluation_modules)
        self._rule = ClippedRule(rule, self.groups, clip_norm)
        # The norm of a gradient depends on the order of its parts, by rounding: the module's order is the order everywhere.
        self.names = tuple(name for name, _ in model.named_parameters() if name in self._rule.group_of)
        self._bound = BoundModel(model)
        self.meta_module = meta
        own = {} if meta is None else {name: leaf for name, leaf in meta.named_parameters() if leaf.requires_grad}
        self.meta = {name: leaf.detach().clone() for name, leaf in own.items()}
        if direction is not None and getattr(rule, "maximize", False):
            raise InputError(f"{direction} steps downhill, and {rule} up. Give the task's losses the other sign.")
        self.gradient = StepGradient(task, self.names, self._rule.group_of, direction)

    def with_meta(self, meta: Params) -> "UpdateMap":
        """Return the same map with other meta-parameters, copied.

        Raises:
            InputError: names or shapes are not those of the meta-module.
        """
        shapes = [{name: tuple(leaf.shape) for name, leaf in given.items()} for given in (self.meta, meta)]
        if shapes[0] != shapes[1]:
            raise InputError(f"the meta-parameters of this run are {shapes[0]}, got {shapes[1]}.")
        changed = copy(self)
        changed.meta = {name: meta[name].detach().clone() for name in self.meta}
        return changed

    def with_clip_norm(self, clip_norm: float) -> "UpdateMap":
        """Return the same map with gradients clipped to another norm."""
        changed = copy(self)
        changed.clip_norm, changed._rule = clip_norm, ClippedRule(self.rule, self.groups, clip_norm)
        return changed

    # ------------------------------------------------------------------ the map itself

    def __call__(self, state: TrainingState, inputs: StepInputs) -> TrainingState:
        """Return s_{t+1}; bit for bit what an ordinary loop of torch gives on the same machine."""
        grads, buffers, _ = self.step_gradient(state, inputs)
        with torch.no_grad():
            params, slots = self.update(state.params, state.slots, self._rule.clip(grads), inputs.hyper)
        return TrainingState(params, slots, buffers, state.step + 1)

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
        one = states.map(lambda leaf: leaf[0])
        batch = map_batch(lambda leaf: leaf[0], inputs.batch) if own_batches else inputs.batch
        used = self._used(one, replace(inputs, batch=batch))

        def step(params: Params, slots: Slots, buffers: Params, weights: Tensor, batch: object) -> tuple[Params, Slots, Params]:
            new = self._step(TrainingState(params, slots, buffers, 0), replace(inputs, batch=batch), weights, used)
            return new.params, new.slots, new.buffers

        axes = (0, 0, 0, 0, 0 if own_batches else None)
        stepped = torch.func.vmap(step, axes, randomness="same")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batched form
            new = stepped(states.params, states.slots, states.buffers, weights, inputs.batch)
        return TrainingState(*new, states.step + 1)

    def differentiable_step(self, state: TrainingState, inputs: StepInputs) -> TrainingState:
        """Return s_{t+1} as a function that `torch.func` and autograd can differentiate by the tensors of ``state``.

        Its values are those of a call, to rounding. `pullback` and `pushforward` cost less; this is for what they cannot do,
        such as derivatives of products.
        """
        weights = _weights(state, inputs)
        with twice_differentiable(own_functions=False):
            return self._step(state, inputs, weights, self._used(state, inputs))

    def _step(self, state: TrainingState, inputs: StepInputs, weights: Tensor, used: frozenset[str]) -> TrainingState:
        grads, buffers = self.gradient.pure(self._losses, state.params, state.buffers, inputs, weights)
        grads = self._rule.clip({name: leaf for name, leaf in grads.items() if name in used})
        return TrainingState(*self.update(state.params, state.slots, grads, inputs.hyper), buffers, state.step + 1)

    def _used(self, state: TrainingState, inputs: StepInputs) -> frozenset[str]:
        return self.gradient.used(self._losses, state.params, state.buffers, inputs, None)

    def step_gradient(self, state: TrainingState, inputs: StepInputs) -> tuple[Params, Params, Tensor]:
        """Return the step's gradient (or direction) of the parameters that have one, the buffers after it, and the loss.

        The loss is summed over the players that move in this step.
        """
        params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
        buffers = {name: leaf.detach().clone() for name, leaf in state.buffers.items()}
        grads, loss = self._gradient(params, buffers, inputs, inputs.weights)
        return grads, {name: leaf.detach() for name, leaf in buffers.items()}, loss

    def update(self, params: Params, slots: Slots, grads: Params, hyper: tuple[Hyper, ...]) -> tuple[Params, Slots]:
        """Apply the update rule U. A parameter without gradient stays as it is, as in torch."""
        return self._rule.apply(params, slots, grads, hyper)

    def group_of(self, name: str) -> int:
        """Return the index of the optimizer group that a parameter belongs to."""
        return self._rule.group_of[name]

    def step_losses(
        self, model: nn.Module, batch: Any, weights: Tensor | None, size: int, step: int, meta: Params | None = None
    ) -> Losses:
        """Return each player's loss of a batch, the meta-module bound to ``meta`` or to the run's meta-parameters."""

        def losses(*more: Meta) -> Losses:
            return player_losses(self.task, self.gradient.players, model, batch, weights, size, *more)

        return losses() if self.meta_module is None else self._with_meta(losses, step, meta)

    def measurements(self, state: TrainingState, batch: object) -> Float[Tensor, " query"]:
        """Evaluate the task's measurements at ``state``, in evaluation mode; differentiable in the state's tensors."""
        return self.ask(lambda model: self.task.measurements(model, batch), state)

    def ask(self, function: Callable[[nn.Module], Tensor], state: TrainingState) -> Tensor:
        """Evaluate ``function(model)`` at ``state``, in evaluation mode; differentiable in the state's tensors."""
        with evaluation_mode(self.model), torch.enable_grad():
            return self._bound(function, {**state.params, **state.buffers})

    def losses(self, state: TrainingState, batch: object) -> Float[Tensor, " batch"]:
        """Per-example losses at ``state``, in evaluation mode; differentiable in the state's tensors."""
        task: Any = self.task
        self.gradient.refuse_game()
        if isinstance(task, CoupledTask):
            raise InputError(f"{type(task).__name__} couples the examples of a batch: it has no per-example losses.")
        with evaluation_mode(self.model), torch.enable_grad():
            losses = task.losses if self.meta_module is None else self._losses_with_meta(state.step)
            return self._bound(losses, {**state.params, **state.buffers}, batch)

    # ------------------------------------------------------------------ its Jacobian products

    def pullback(
        self,
        state: TrainingState,
        inputs: StepInputs,
        costates: StateVectors,
        route: Route = "batched",
        out: StateVectors | None = None,
        curvature: StepCurvature = "hessian",
        wrt: frozenset[str] = frozenset(),
    ) -> Pullback:
        """Pull costates of s_{t+1} back to s_t: ``Aᵀ λ``, and the scores ``⟨λ, ∂Φ/∂w_i⟩`` of the batch's examples.

        Args:
            state: s_t.
            inputs: u_t.
            costates: λ_{t+1}, a leading axis ``query`` on every leaf.
            route: ``"batched"`` reverses many costates at once, ``"loop"`` one after the other.
            out: where to write the costates of s_t; may be ``costates`` itself, which saves memory and much time.
            curvature: ``"gauss_newton"`` puts the batch's Gauss-Newton matrix in the place of its Hessian.
            wrt: names of other inputs to differentiate by (see ``step_inputs.py``).

        Raises:
            NoSecondDerivative: a kernel of the model can be differentiated only once.
            InputError: the task does not say what a Gauss-Newton matrix needs to know (see `SplitTask`), or ``wrt`` names what
                is no input of this step.
        """
        costates = self._rule.with_all_slots(costates)
        self.check_inputs(wrt, inputs)
        leaves, rebuild = self._input_leaves(state, inputs, wrt)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        graph = self._graph(state, rebuild(leaves) if leaves else inputs, curvature, leaves, len(costates) > 1)
        rule, by_inputs = self._rule.at(state, graph.grads, inputs.hyper, wrt), []
        target = costates.map(torch.empty_like) if out is None else out
        scores = graph.weights.new_zeros(len(costates), len(graph.weights))
        size = max(1, min(len(costates), _SCALARS_AT_ONCE // count(state.params)))
        for start in range(0, len(costates), size):
            rows = slice(start, start + size)
            part = costates[rows]
            carried, gamma, by_hyper = rule.pull(part)
            products, own_scores = graph.reverse(gamma, part.buffers, route, retain_graph=start + size < len(costates))
            if own_scores is not None:
                scores[rows] = own_scores
            elif len(self.gradient.turns) == 1:  # in a game, a turn may well be a generator's, which sees no examples
                raise InputError(f"the loss of {type(self.task).__name__} does not depend on the example weights it is given.")
            found = {name: _or_zeros(products[name], leaf, len(part)) for name, leaf in leaves.items()}
            by_inputs.append(InputVectors.of(by_hyper, found))
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
        return Pullback(target, scores, InputVectors.cat(by_inputs))

    def pullback_by_differences(
        self, state: TrainingState, inputs: StepInputs, costates: StateVectors, radius: float, wrt: frozenset[str] = frozenset()
    ) -> Pullback:
        """Do what `pullback` does without second derivatives: by central differences of the loss's first ones along γ.

        Args:
            state: s_t.
            inputs: u_t.
            costates: λ_{t+1}. Those of buffers are dropped: what buffers owe to parameters has no gradient to differ.
            radius: length of the step to either side.
            wrt: names of other inputs to differentiate by.
        """
        if not self.gradient.plain:
            raise InputError("differences along a costate need a symmetric Jacobian, which a game has not. Use Unrolled().")
        costates = self._rule.with_all_slots(costates)
        self.check_inputs(wrt, inputs)
        leaves, rebuild = self._input_leaves(state, inputs, wrt)
        sources = {**state.params, **leaves, "example_weights": _weights(state, inputs)}

        def gradient(params: Params) -> Params:
            own = {name: leaf.detach().requires_grad_() for name, leaf in {**sources, **params}.items()}
            buffers = {name: leaf.clone() for name, leaf in state.buffers.items()}
            at = {name: own[name] for name in state.params}
            step = rebuild({name: own[name] for name in leaves})
            loss = self._losses(at, buffers, step, own["example_weights"])[ONE]
            found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            return {name: grad for name, grad in zip(own, found, strict=True) if grad is not None}

        used = {name: grad for name, grad in gradient(state.params).items() if name in state.params}
        carried, gamma, by_hyper = self._rule.at(state, used, inputs.hyper, wrt).pull(costates)
        found = {name: leaf.new_zeros(len(costates), *leaf.shape) for name, leaf in sources.items()}
        for row in range(len(costates)):
            direction = {name: leaf[row] for name, leaf in gamma.items()}
            norm = torch.stack([leaf.norm() for leaf in direction.values()]).norm()
            if norm == 0:
                continue
            length = radius / norm
            sides = [
                gradient({name: leaf + sign * length * direction[name] for name, leaf in state.params.items() if name in gamma})
                for sign in (1, -1)
            ]
            for name in sides[0]:
                found[name][row] = (sides[0][name] - sides[1][name]) / (2 * length)
        params = {name: leaf + found[name] for name, leaf in carried.params.items()}
        others = InputVectors.of(by_hyper, {name: found[name] for name in leaves})
        buffers = {name: torch.zeros_like(leaf) for name, leaf in costates.buffers.items()}
        return Pullback(StateVectors(params, carried.slots, buffers), found["example_weights"], others)

    def pushforward(
        self,
        state: TrainingState,
        inputs: StepInputs,
        tangents: StateVectors,
        weight_tangents: Float[Tensor, "tangent batch"] | None = None,
        input_tangents: InputVectors | None = None,
    ) -> StateVectors:
        """Push tangents of s_t (and of the step's inputs) forward to s_{t+1}: ``A δ + B v``.

        Args:
            state: s_t.
            inputs: u_t.
            tangents: δ_t, a leading axis ``tangent`` on every leaf.
            weight_tangents: v, the direction in which the example weights of this batch move.
            input_tangents: v of other inputs.
        """
        others = InputVectors() if input_tangents is None else input_tangents
        wrt: frozenset[str] = frozenset({*others.hyper, *others.batch} | ({"meta"} if others.meta else set()))
        self.check_inputs(wrt, inputs)
        leaves, rebuild = self._input_leaves(state, inputs, wrt)
        own = {name: leaf for name, leaf in others.leaves().items() if name in leaves}
        tangents = self._rule.with_all_slots(tangents)
        at = _weights(state, inputs)
        moves = at.new_zeros(len(tangents), len(at)) if weight_tangents is None else weight_tangents.to(at)

        def gradient(params: Params, buffers: Params, weights: Tensor, leaves: Params) -> tuple[Params, Params]:
            with twice_differentiable(own_functions=False):
                grads, after = self.gradient.pure(self._losses, params, {**state.buffers, **buffers}, rebuild(leaves), weights)
            return grads, {name: after[name] for name in buffers}

        def push(params: Params, buffers: Params, weights: Tensor, others: Params) -> tuple[Params, Params]:
            moving = {name: state.buffers[name] for name in buffers}
            return torch.func.jvp(gradient, (state.params, moving, at, leaves), (params, buffers, weights, others))[1]

        pushed = torch.func.vmap(push, randomness="same")(tangents.params, tangents.buffers, moves, own)
        grad_tangents, buffer_tangents = pushed
        used = self.graph(state, inputs).grads
        rule = self._rule.at(state, used, inputs.hyper, wrt)
        return StateVectors(*rule.push(tangents, grad_tangents, others.hyper), buffer_tangents)

    # ------------------------------------------------------------------ inputs to differentiate by

    def check_inputs(self, wrt: frozenset[str], inputs: StepInputs) -> None:
        """Refuse names in ``wrt`` that are no inputs of this step.

        Raises:
            InputError: with the names that are.
        """
        direction = self.gradient.direction
        if "learning_rate" in wrt and getattr(direction, "rate", 0.0) is None:
            raise InputError(f"derivatives by the learning rate do not go through {direction}: give it a rate of its own.")
        allowed = self.inputs_of(inputs)
        if not wrt <= allowed:
            raise InputError(
                f"{sorted(wrt - allowed)} did not go into this training. What did, and can be differentiated by: "
                f"{sorted(allowed)}."
                + (" For momentum, train with momentum above 0." if wrt & {"momentum"} else "")
                + (" For meta, record with meta=module." if "meta" in wrt - allowed else "")
            )

    def inputs_of(self, inputs: StepInputs) -> set[str]:
        """Return the names of what went into a step and can be differentiated by, other than the example weights."""
        allowed = {name for hyper in inputs.hyper for name in hyper} - _COUNTERS | set(batch_names(inputs.batch))
        if not any(slot.startswith("velocity") for slot in self.rule.slots):
            allowed -= {"momentum", "dampening"}  # there is no term that they could scale
        return allowed | ({"clip_norm"} if self.clip_norm is not None else set()) | ({"meta"} if self.meta else set())

    def _input_leaves(self, state: TrainingState, inputs: StepInputs, wrt: frozenset[str]) -> tuple[dict[str, Tensor], Rebuild]:
        def logits() -> Tensor | None:
            task = self.task
            if not isinstance(task, SplitTask):
                return None
            buffers = {name: leaf.clone() for name, leaf in state.buffers.items()}
            with torch.no_grad():
                return self._run(lambda model: task.outputs(model, inputs.batch), state.params, buffers, inputs)

        return input_leaves(inputs, wrt, self.meta if inputs.meta is None else inputs.meta, logits)

    # ------------------------------------------------------------------ running the user's code

    def graph(
        self, state: TrainingState, inputs: StepInputs, others: Mapping[str, Tensor] | None = None, shared: bool = True
    ) -> StepGraph:
        """Return the graph of the step's gradient at ``state``, to be reversed for as many costates as one likes."""
        return StepGraph(self._gradient, state, inputs, others, shared, own_functions=self.gradient.direction is None)

    def linearised_rule(self, state: TrainingState, grads: Params, inputs: StepInputs) -> LinearisedRule:
        """Return clipping and update rule, linearised at ``state`` and a batch gradient."""
        return self._rule.at(state, grads, inputs.hyper)

    def _graph(
        self, state: TrainingState, inputs: StepInputs, curvature: StepCurvature, others: dict[str, Tensor], shared: bool
    ) -> StepGraph | GaussNewtonGraph:
        if curvature == "hessian":
            return self.graph(state, inputs, others, shared)
        if not self.gradient.plain:
            raise InputError('games and directions have no Gauss-Newton matrix. Use curvature="hessian".')
        if self.meta_module is not None or others:
            raise InputError(
                'curvature="gauss_newton" differentiates by example weights and hyperparameters only, and knows no '
                'meta-modules. Use curvature="hessian".'
            )
        task: Any = self.task
        return GaussNewtonGraph(task, self._run, state, inputs)

    def _losses(self, params: Params, buffers: Params, inputs: StepInputs, weights: Tensor | None) -> Losses:
        """Evaluate the losses of the step in training mode, with its own random numbers; ``buffers`` is written to."""
        own = (inputs.batch, weights, len(inputs.example_ids), inputs.step, inputs.meta)
        return self._run(lambda model: self.step_losses(model, *own), params, buffers, inputs)

    def _gradient(
        self, params: Params, buffers: Params, inputs: StepInputs, weights: Tensor | None, create_graph: bool = False
    ) -> tuple[Params, Tensor]:
        return self.gradient(self._losses, params, buffers, inputs, weights, create_graph)

    def _losses_with_meta(self, step: int) -> Callable[[nn.Module, Any], Tensor]:
        task: Any = self.task

        def losses(model: nn.Module, batch: Any) -> Tensor:
            return self._with_meta(lambda meta: task.losses(model, batch, meta), step, None)

        return losses

    def _with_meta(self, function: Callable[[Meta], Any], step: int, params: Params | None) -> Any:
        assert self.meta_module is not None
        tensors = {name: leaf.clone() for name, leaf in self.meta_module.named_buffers()}  # what is written to them is dropped
        tensors |= self.meta if params is None else params
        return BoundModel(self.meta_module)(lambda module: function(Meta(module, step)), tensors)

    def _run(self, function: Callable[[nn.Module], Any], params: Params, buffers: Params, inputs: StepInputs) -> Any:
        """Evaluate ``function(model)`` as a step does: in training mode, with its random numbers, writing to ``buffers``."""
        tensors = {**params, **buffers}
        with training_mode(self.model, self.evaluation_modules), torch.enable_grad(), seeded(inputs.seed, params):
            value = self._bound(function, tensors)
        buffers.update({name: tensors[name] for name in buffers})
        return value


def _or_zeros(product: Tensor | None, leaf: Tensor, count: int) -> Tensor:
    return leaf.new_zeros(count, *leaf.shape) if product is None else product


def _weights(state: TrainingState, inputs: StepInputs) -> Tensor:
    some = next(iter(state.params.values()))
    return some.new_ones(len(inputs.example_ids)) if inputs.weights is None else inputs.weights.to(some)
