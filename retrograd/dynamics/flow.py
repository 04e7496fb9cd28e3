"""Sequences of maps on flat vectors, with products by their Jacobians: what everything in this package is asked of.

    s_{t+1} = F_t(s_t)        push: δ_{t+1} = A_t δ_t        pull: λ_t = A_tᵀ λ_{t+1}        A_t = ∂F_t/∂s at s_t

s          the state, a vector [dim]. Of training: parameters, then optimizer slots, then those buffers that the steps write;
δ, λ       tangents and costates, rows of [tangent, dim] and [query, dim];
F_t        a plain function (`FunctionFlow`), or the update map Φ of a run with the inputs of step t (`StepFlow`): same batch,
           same random numbers, same hyperparameters. There is no second implementation of Φ.

A `StepFlow` calls the update map's own step and products for walking, pushing and pulling, so that states are those of the run
bit for bit; only a call, which torch.func and autograd can transform, takes the map's differentiable form.

Assumptions: F can be differentiated; for ``pull`` of a run, and for derivatives of exponents, twice. Slots that a rule reads
through √v have no derivative at v = 0, which is where Adam begins: start after its first step. Cost: a push or pull takes about
as much as ``tangent`` (``query``) gradients of F; memory as many states.

Reference: Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570, section 2.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, NotRecorded
from retrograd.params import Params, flatten, unflatten
from retrograd.trajectory import StateVectors, StepInputs, TrainingState, Trajectory, UpdateMap


@runtime_checkable
class Flow(Protocol):
    """A sequence of maps s_{t+1} = F_t(s_t) on flat vectors."""

    @property
    def dim(self) -> int:
        """Length of a state."""
        ...

    @property
    def steps(self) -> int | None:
        """How many maps there are; None: as many as one likes."""
        ...

    def __call__(self, step: int, state: Tensor, /) -> Tensor:
        """Return F_t(s), ``[dim]``; pure, and open to torch.func and autograd."""
        ...

    def push(self, step: int, state: Tensor, tangents: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return F_t(s) and the tangents ``[tangent, dim]``, pushed forward; no graph is kept."""
        ...

    def pull(self, step: int, state: Tensor, costates: Tensor, /) -> Tensor:
        """Return the costates ``[query, dim]``, pulled back; no graph is kept."""
        ...


class FunctionFlow:
    """The same function over and over, or one function of step and state.

    Args:
        function: F, from ``[dim]`` to ``[dim]``; pure, and made of what torch.func can transform (inside it take gradients with
            ``torch.func.grad``, not ``torch.autograd.grad``).
        dim: length of a state.
        steps: how many maps there are; None: as many as one likes.
        by_step: ``function`` takes ``(step, state)`` instead of ``(state)``.

    `push` and `pull` also take many states at once, ``[start, dim]`` with tangents ``[start, tangent, dim]``: where functions
    are small that is as fast as one. There, torch 2.13 differentiates ``torch.linalg.solve`` wrongly, without a word: write
    ``torch.linalg.inv`` in functions of your own.

    >>> grow = FunctionFlow(lambda state: torch.stack([state[0] * state[1], state[0] + state[1]]), dim=2)
    >>> grow(0, torch.tensor([1.0, 3.0]))
    tensor([3., 4.])
    >>> grow.push(0, torch.tensor([1.0, 3.0]), torch.eye(2))[1]
    tensor([[3., 1.],
            [1., 1.]])
    """

    def __init__(self, function: Callable[..., Tensor], dim: int, steps: int | None = None, by_step: bool = False):
        if dim < 1 or (steps is not None and steps < 0):
            raise InputError(f"dim must be at least 1 and steps at least 0 or None, got dim={dim} and steps={steps}.")
        self.function, self.dim, self.steps, self.by_step = function, dim, steps, by_step

    def __call__(self, step: int, state: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return F(s)."""
        return self.function(step, state) if self.by_step else self.function(state)

    def push(
        self, step: int, state: Float[Tensor, "*start dim"], tangents: Float[Tensor, "*start tangent dim"]
    ) -> tuple[Float[Tensor, "*start dim"], Float[Tensor, "*start tangent dim"]]:
        """Return F(s) and the tangents, pushed forward."""
        check_step(self, step)
        with torch.no_grad():
            return push_with_graph(self, step, state, tangents)

    def pull(
        self, step: int, state: Float[Tensor, "*start dim"], costates: Float[Tensor, "*start query dim"]
    ) -> Float[Tensor, "*start query dim"]:
        """Return the costates, pulled back."""
        check_step(self, step)

        def one(state: Tensor, costates: Tensor) -> Tensor:
            transposed: Any = torch.func.vjp(lambda own: self(step, own), state)[1]
            return torch.func.vmap(lambda costate: transposed(costate)[0])(costates)

        with torch.no_grad():
            return torch.func.vmap(one)(state, costates) if state.dim() > 1 else one(state, costates)


class StepFlow:
    """Training steps: an update map with the inputs of each step, on flattened states.

    Args:
        update_map: Φ.
        inputs: returns u_t for step t; the same at every t for a game or full-batch training.
        template: any state: it names the parts, and has the values of those buffers that are not part of the vectors.
        steps: how many steps there are; None: as many as one likes.
        run: the recorded run that these steps are of, if any; see `StepFlow.of`.

    Attributes:
        dim: length of a state.

    >>> from torch import nn
    >>> from retrograd.task import Regression
    >>> from retrograd.update_rules import SGD
    >>> phi = UpdateMap(nn.Linear(1, 1, bias=False), Regression(), SGD(), groups=(("weight",),))
    >>> hyper = {"learning_rate": 0.25, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    >>> inputs = StepInputs(torch.tensor([0]), None, (hyper,), (torch.ones(1, 1), torch.tensor([[3.0]])), seed=0)
    >>> flow = StepFlow(phi, lambda step: inputs, TrainingState({"weight": torch.ones(1, 1)}, {}, {}, 0))
    >>> flow.push(0, torch.tensor([1.0]), torch.tensor([[1.0]]))   # 1 − 0.25 · 2 (1 − 3), and 1 − 0.25 · 2
    (tensor([2.]), tensor([[0.5000]]))
    """

    def __init__(
        self,
        update_map: UpdateMap,
        inputs: Callable[[int], StepInputs],
        template: TrainingState,
        steps: int | None = None,
        run: Trajectory | None = None,
    ):
        self.update_map, self.inputs, self.steps, self.run = update_map, inputs, steps, run
        self._others: dict[int, Params] = {}  # step -> buffers that are not part of the vectors, where they are known
        self._on_record: tuple[int, Tensor] | None = None  # the last state of the record's own that was handed out
        self._last_inputs: tuple[int, StepInputs] | None = None
        slots = {slot: template.slots[slot] for slot in update_map.rule.slots} if update_map.rule.slots else {}
        written: set[str] = set()
        if template.buffers and steps != 0:
            written = set(update_map.graph(template, inputs(0)).written)
        moving = {n: leaf for n, leaf in template.buffers.items() if n in written and leaf.is_floating_point()}
        self._like = TrainingState(template.params, slots, moving, template.step).tensors()
        self._buffers, self._moving = template.buffers, frozenset(moving)
        self.dim = sum(leaf.numel() for leaf in self._like.values())

    @staticmethod
    def of(run: Trajectory) -> "StepFlow":
        """Return the steps of a recorded run, with its batches and random numbers; `start` is where it began."""
        if not len(run):
            raise InputError("this run has no steps, and so no dynamics. Record at least one.")
        flow = StepFlow(run.update_map, run.inputs, run.state(0), len(run), run)
        flow._others[0] = flow._rest(run.state(0).buffers)
        return flow

    @staticmethod
    def constant(update_map: UpdateMap, inputs: StepInputs, template: TrainingState, steps: int | None = None) -> "StepFlow":
        """Return a flow with the same inputs in every step: full-batch training, or a game. Only the step's number moves on."""
        return StepFlow(update_map, lambda step: replace(inputs, step=inputs.step + step), template, steps)

    # ------------------------------------------------------------------ states and vectors

    def flatten(self, state: TrainingState) -> Float[Tensor, " dim"]:
        """Return a state as a vector: parameters, slots, and the buffers that move."""
        tensors = state.tensors()
        return flatten(tensors[name] for name in self._like).detach()

    def unflatten(self, vector: Float[Tensor, " dim"], step: int = 0) -> TrainingState:
        """Return a vector as a state before step ``step``."""
        if vector.shape != (self.dim,):
            raise InputError(f"states of this training are vectors of {self.dim} numbers, got shape {tuple(vector.shape)}.")
        state = TrainingState.from_tensors(self._split(vector), step)
        return replace(state, buffers={**self._others_at(step), **state.buffers})

    def vectors(self, rows: Float[Tensor, "tangent dim"]) -> StateVectors:
        """Return rows as a batch of vectors shaped like a state."""
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise InputError(f"vectors along this training have shape [count, {self.dim}], got {tuple(rows.shape)}.")
        state = TrainingState.from_tensors(self._split(rows), 0)
        return StateVectors(state.params, state.slots, state.buffers)

    def rows(self, vectors: StateVectors) -> Float[Tensor, "tangent dim"]:
        """Undo `vectors`."""
        leaves = vectors.leaves()
        return flatten([leaves[name] for name in self._like], batched=True)

    def state(self, step: int) -> Float[Tensor, " dim"]:
        """Return the recorded state before step ``step``.

        Raises:
            InputError: these are not the steps of a recorded run.
        """
        if self.run is None:
            raise InputError("these steps are of no recorded run, so they have no states of their own. Give a state.")
        state = self.run.state(step)
        self._others[step] = self._rest(state.buffers)
        return self._hand_out(step, self.flatten(state))

    # ------------------------------------------------------------------ the maps

    def __call__(self, step: int, state: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return Φ_t(s), in a form that torch.func and autograd can transform."""
        check_step(self, step)
        after = self.update_map.differentiable_step(self.unflatten(state, step), self._inputs_aside(step))
        tensors = after.tensors()
        return flatten(tensors[name] for name in self._like)

    def advance(self, step: int, state: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return Φ_t(s), bit for bit as in training.

        A state that came from `state`, or from this method after it, is the record's own: the step is then compared with what
        was recorded of it.
        """
        check_step(self, step)
        on_record = self._on_record is not None and self._on_record[0] == step and self._on_record[1] is state
        before = self.unflatten(state.detach(), step)
        if on_record and self.run is not None:
            after = self.run.advance(before, step)
        else:
            after = self.update_map(before, self.inputs(step))
        if after.buffers.keys() - self._moving:
            self._others = {0: self._others.get(0, {}), step + 1: self._rest(after.buffers)}
        vector = self.flatten(after)
        return self._hand_out(step + 1, vector) if on_record else vector

    def push(
        self, step: int, state: Float[Tensor, " dim"], tangents: Float[Tensor, "tangent dim"]
    ) -> tuple[Float[Tensor, " dim"], Float[Tensor, "tangent dim"]]:
        """Return Φ_t(s), bit for bit as in training, and the tangents, pushed forward."""
        check_step(self, step)
        before = self.unflatten(state.detach(), step)
        pushed = self.update_map.pushforward(before, self.inputs(step), self.vectors(tangents))
        return self.advance(step, state), self.rows(pushed).to(tangents.dtype)

    def pull(self, step: int, state: Float[Tensor, " dim"], costates: Float[Tensor, "query dim"]) -> Float[Tensor, "query dim"]:
        """Return the costates, pulled back."""
        check_step(self, step)
        before = self.unflatten(state.detach(), step)
        pulled = self.update_map.pullback(before, self.inputs(step), self.vectors(costates))
        return self.rows(pulled.costates).to(costates.dtype)

    # ------------------------------------------------------------------ inside

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        return {name: leaf.to(self._like[name].dtype) for name, leaf in unflatten(vector, self._like).items()}

    def _inputs_aside(self, step: int) -> StepInputs:
        """Read u_t in a thread of its own: data sets may do what torch.func cannot transform, and its state is the thread's."""
        if self._last_inputs is None or self._last_inputs[0] != step:
            with ThreadPoolExecutor(1) as aside:
                self._last_inputs = step, aside.submit(self.inputs, step).result()
        return self._last_inputs[1]

    def _rest(self, buffers: Params) -> Params:
        return {name: leaf for name, leaf in buffers.items() if name not in self._moving}

    def _others_at(self, step: int) -> Params:
        """Return the buffers outside of the vectors: constants, and counters of steps."""
        return self._others.get(step, self._others.get(0) or self._rest(self._buffers))

    def _hand_out(self, step: int, vector: Tensor) -> Tensor:
        self._on_record = (step, vector)
        return vector


class StridedFlow:
    """Several steps of a flow taken as one: a round of players that take turns, or an epoch.

    Args:
        flow: the flow.
        stride: how many of its steps make one.

    >>> StridedFlow(FunctionFlow(torch.square, dim=1), stride=2)(0, torch.tensor([3.0]))
    tensor([81.])
    """

    def __init__(self, flow: Flow, stride: int):
        if stride < 1:
            raise InputError(f"stride must be at least 1, got {stride}.")
        self.flow, self.stride, self.dim = flow, stride, flow.dim
        self.steps = None if flow.steps is None else flow.steps // stride

    def __call__(self, step: int, state: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return the state after ``stride`` steps."""
        check_step(self, step)
        return compose(self.flow, state, self.stride, step * self.stride)

    def push(self, step: int, state: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after ``stride`` steps, and the tangents, pushed forward."""
        check_step(self, step)
        for current in range(step * self.stride, (step + 1) * self.stride):
            state, tangents = self.flow.push(current, state, tangents)
        return state, tangents

    def pull(self, step: int, state: Float[Tensor, " dim"], costates: Float[Tensor, "query dim"]) -> Float[Tensor, "query dim"]:
        """Return the costates, pulled back over ``stride`` steps."""
        check_step(self, step)
        states = [state.detach()]
        steps = range(step * self.stride, (step + 1) * self.stride)
        for current in steps[:-1]:
            with torch.no_grad():
                states.append(self.flow(current, states[-1]))
        for current, own in zip(reversed(steps), reversed(states), strict=True):
            costates = self.flow.pull(current, own, costates)
        return costates


def flow_of(what: object, dim: int | None = None) -> Flow:
    """Return the flow of a recorded run or of a function; a flow is returned as it is.

    Args:
        what: a recorded run, a flow, or a function from ``[dim]`` to ``[dim]``.
        dim: length of a state; needed for a function.

    Raises:
        InputError: ``what`` is none of these, or a function without ``dim``.

    >>> flow_of(torch.sin, dim=3).dim
    3
    """
    if isinstance(what, Trajectory):
        return StepFlow.of(what)
    if isinstance(what, UpdateMap):
        raise InputError(
            "an update map alone lacks the inputs of its steps. Give a recorded run, or "
            "StepFlow(update_map, lambda step: inputs, template=state)."
        )
    if isinstance(what, Flow):
        return what
    if callable(what):
        if dim is None:
            raise InputError("of a plain function the length of a state is not known. Give FunctionFlow(function, dim).")
        function: Any = what
        return FunctionFlow(function, dim)
    raise InputError(f"expected a recorded run, a flow, or a function of a vector, got {type(what).__name__}.")


def start_of(flow: Flow, state: Tensor | None, step: int = 0) -> Tensor:
    """Return ``state``, or where a recorded run was before ``step`` if it is None.

    Raises:
        InputError: there is no recorded state, or ``state`` has another length.
    """
    if state is None:
        if not isinstance(flow, StepFlow) or flow.run is None:
            raise InputError("only a recorded run knows where it starts. Give state, a vector.")
        return flow.state(step)
    if state.shape[-1:] != (flow.dim,):
        raise InputError(f"states are vectors of {flow.dim} numbers, got shape {tuple(state.shape)}.")
    return state


def check_step(flow: Flow, step: int) -> None:
    """Refuse steps that a flow does not have.

    Raises:
        NotRecorded: with those that it has.
    """
    if step < 0 or (flow.steps is not None and step >= flow.steps):
        last = "on" if flow.steps is None else f"to {flow.steps - 1}"
        raise NotRecorded(f"there is no step {step}. Steps: 0 {last}.")


def push_with_graph(flow: Flow, step: int, state: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Do what ``flow.push`` does, by forward mode over a call, in a form that autograd can differentiate once more."""

    def along(state: Tensor, tangent: Tensor) -> Any:
        return torch.func.jvp(lambda own: flow(step, own), (state,), (tangent,))

    if state.dim() == 1:
        values, pushed = torch.func.vmap(along, (None, 0), randomness="same")(state, tangents)
        return values[0], pushed  # the value does not depend on the tangent, but vmap cannot know that
    # One vmap over both axes: where functions are small, nesting two costs more than evaluating F once for each tangent.
    states = state[..., None, :].expand(tangents.shape)
    values, pushed = torch.func.vmap(along, randomness="same")(states.reshape(-1, flow.dim), tangents.reshape(-1, flow.dim))
    return values.reshape(tangents.shape)[..., 0, :], pushed.reshape(tangents.shape)


def push_in_slices(flow: Flow, step: int, state: Tensor, tangents: Tensor, size: int = 64) -> tuple[Tensor, Tensor]:
    """Push many tangents ``[*start, tangent, dim]``, ``size`` at a time: the memory of a push grows with their number."""
    if tangents.shape[-2] <= size:
        return flow.push(step, state, tangents)
    parts = [flow.push(step, state, part) for part in tangents.split(size, dim=-2)]
    return parts[0][0], torch.cat([part[1] for part in parts], dim=-2)


def jacobian(flow: Flow, step: int, state: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
    """Return A_t, row by output and column by input, by pushing every unit vector.

    >>> jacobian(FunctionFlow(lambda state: torch.stack([state[0] * state[1], state[1]]), 2), 0, torch.tensor([5.0, 3.0]))
    tensor([[3., 5.],
            [0., 1.]])
    """
    return push_in_slices(flow, step, state, torch.eye(flow.dim, dtype=state.dtype, device=state.device))[1].T


def compose(flow: Flow, state: Float[Tensor, " dim"], steps: int, step: int = 0) -> Float[Tensor, " dim"]:
    """Return F_{step+steps−1} ∘ … ∘ F_step at ``state``, open to torch.func and autograd."""
    for current in range(step, step + steps):
        state = flow(current, state)
    return state
