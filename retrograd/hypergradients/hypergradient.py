"""Hypergradients: the derivative of an outcome of training by anything that went into it.

    d f / d u_t = B_tᵀ λ_{t+1},     λ_t = A_tᵀ λ_{t+1},   λ_T = ∇f(s_T),     d f / d s_0 = λ_0

λ_t  costate: how the outcome moves if the state moves at step t, from an adjoint, exact or not;
B_t  derivative of step t by its inputs: example weights, hyperparameters, meta-parameters, the batch itself.

An input that is the same in several steps (a learning rate, a meta-parameter, an example) gets the sum over them. One walk back
gives the derivatives by all inputs, for all questions.

| method | exact | cost | what can be asked |
|---|---|---|---|
| `Unrolled()` | yes | about two runs a question, states by the run's schedule | everything |
| `Forward()` | yes | two to three runs a number, no storage | few numbers, the same in every step |
| `Unrolled(last=K)` | no | K steps | what the last K steps saw |
| `FixedPoint(solver=…)` | at a fixed point | Hessian products at the end | what the training loss and its decay depend on |
| `FirstOrder(last=1)` | no | two first-order passes a step | what the last steps saw; no second derivatives |

References: Maclaurin, Duvenaud, Adams (2015), "Gradient-based hyperparameter optimization through reversible learning";
Franceschi et al. (2017); Lorraine, Vicol, Duvenaud (2020); Engstrom et al. (2025), "Optimizing ML training with metagradient
descent".
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from retrograd.adjoint import FirstOrder, FixedPoint, Notes, Outcome, Queries, Unrolled
from retrograd.errors import InputError, NonFinite, UntrustedGradient
from retrograd.hypergradients.chain import Chain
from retrograd.hypergradients.forward import Forward
from retrograd.hypergradients.result import Hypergradient
from retrograd.params import Params
from retrograd.trajectory import Pullback, StateVectors, StepInputs, Trajectory

Method = Unrolled | FixedPoint | FirstOrder | Forward

_WHOLE_RUN = ("example_weights", "initial_params")  # asked of a run, not of the update map


@overload
def hypergradient(
    run: Trajectory, outcome: Any, wrt: str | Iterable[str], *, method: Method | None = None, per_step: bool = False
) -> Hypergradient: ...
@overload
def hypergradient(
    run: Chain,
    outcome: Any,
    wrt: str | Iterable[str],
    *,
    method: Method | Sequence[Method] | None = None,
    per_step: bool = False,
) -> tuple[Hypergradient, ...]: ...
def hypergradient(
    run: Trajectory | Chain,
    outcome: Any,
    wrt: str | Iterable[str],
    *,
    method: Method | Sequence[Method] | None = None,
    per_step: bool = False,
) -> Hypergradient | tuple[Hypergradient, ...]:
    """Differentiate an outcome of training by what went into it.

    Args:
        run: a recorded run, or a `chain` of them.
        outcome: a function of the trained model, `Outcome`, `Queries`, or data, whose mean measurement is asked.
        wrt: names of inputs: ``"example_weights"``, ``"initial_params"``, ``"meta"``, ``"inputs"``, ``"labels"`` (or the
            keys of batches that are dicts), ``"clip_norm"``, and the hyperparameters of the optimizer:
            ``"learning_rate"``, ``"weight_decay"``, ``"momentum"``, ``"beta1"``, ….
        method: how costates are obtained; exact unrolling if not given. For a chain one for all stages, or one for each.
        per_step: keep hyperparameters of different steps apart, ``[query, step, group]`` instead of ``[query, group]``.

    Returns:
        The derivatives; for a chain one `Hypergradient` for each stage, in the order of the stages, each with those inputs
        that its stage has.

    Raises:
        InputError: the training has no such input, or the method can't give the derivative by it.
        NonFinite: a derivative became NaN or infinite, with the step and the names.

    One step of gradient descent on (w − 3)² / 1 from w = 1 at rate .25 ends at 2; d w / d rate = −g = 4:

    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> data = (torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.25), epochs=1, batch_size=1)
    >>> hypergradient(run, lambda model: model.weight.sum(), "learning_rate")["learning_rate"]
    tensor([[4.]])
    """
    names = frozenset([wrt] if isinstance(wrt, str) else wrt)
    asked = Outcome.of(outcome)
    if isinstance(run, Chain):
        return _through_stages(run, asked, names, method, per_step)
    if isinstance(method, Sequence):
        raise InputError("several methods are for the stages of a chain; a run has one.")
    _check(run, names, names)
    return _of_run(run, asked, names, method or Unrolled(), per_step)


def _through_stages(
    stages: Chain, outcome: "Outcome | Queries", names: frozenset[str], method: Any, per_step: bool
) -> tuple[Hypergradient, ...]:
    methods = list(method) if isinstance(method, Sequence) else [method or Unrolled()] * len(stages)
    if len(methods) != len(stages):
        raise InputError(f"{len(stages)} stages need one method for all of them or one for each, got {len(methods)}.")
    for number, own in enumerate(methods):
        if number and isinstance(own, FixedPoint | Forward):
            raise InputError(
                f"{type(own).__name__} gives no derivative by the state that stage {number} began with (a fixed point forgets "
                "it), so nothing of the stages before it. Use Unrolled() for every stage but the first."
            )
        if len(stages) > 1 and isinstance(own, Forward):
            raise InputError("forward mode runs through one stage only; use Unrolled().")
    known = [_inputs(run) for run in stages.stages]
    _check(stages.stages[0], names, set.union(*known))
    found: list[Hypergradient] = []
    last = stages.stages[-1]
    # Buffers that the last stage does not move may have been moved before it.
    taken = stages.taken(len(stages) - 1) if len(stages) > 1 else {}
    cotangents = outcome.gradients(last, last.final_state, taken.keys() & last.final_state.buffers.keys())
    values = outcome.values(last.update_map, last.final_state).detach()
    for number in reversed(range(len(stages))):
        run, notes = stages.stages[number], Notes()
        own = names & known[number]
        walked = _Walk(run, own, per_step)
        start = walked.back(methods[number], cotangents, notes)
        found.append(_finished(walked.values, values, methods[number], notes))
        if number:
            assert start is not None
            cotangents = stages.pull_handover(number, start)
    return tuple(reversed(found))


def _of_run(
    run: Trajectory, outcome: "Outcome | Queries", names: frozenset[str], method: Method, per_step: bool
) -> Hypergradient:
    notes, final = Notes(), run.final_state
    if isinstance(method, Forward):
        if per_step or names & {*_WHOLE_RUN, "inputs", "labels"}:
            raise InputError("forward mode differentiates by few numbers that are the same in every step; use Unrolled().")
        values: dict[str, Tensor | Params] = method.derivatives(run, outcome, names, notes)
    else:
        walked = _Walk(run, names, per_step)
        walked.back(method, outcome.gradients(run, final), notes)
        values = walked.values
    return _finished(values, outcome.values(run.update_map, final).detach(), method, notes)


def _finished(values: dict[str, Tensor | Params], outcome: Tensor, method: Method, notes: Notes) -> Hypergradient:
    found = Hypergradient(dict(sorted(values.items())), outcome, repr(method), notes.entries)  # in one order for all methods
    for doubt in found.doubts:
        warnings.warn(f"{doubt}. Hypergradient by {found.method}; see verify(...).", UntrustedGradient, stacklevel=4)
    return found


class _Walk:
    """One walk back through a run, which adds up what each step's inputs are worth."""

    def __init__(self, run: Trajectory, names: frozenset[str], per_step: bool):
        self._run, self._names, self._per_step = run, names, per_step
        self.values: dict[str, Any] = {}

    def back(self, method: Unrolled | FixedPoint | FirstOrder, cotangents: StateVectors, notes: Notes) -> StateVectors | None:
        """Contract, and return the costates of the first state (as far back as the method goes), or None."""
        if "initial_params" in self._names and not isinstance(method, Unrolled):
            raise InputError(f"{type(method).__name__} forgets where training began; use Unrolled().")
        last = getattr(method, "last", None)
        truncated = last is not None and last < len(self._run)
        if truncated and "initial_params" in self._names:
            raise InputError(f"the last {last} of {len(self._run)} steps say nothing of the start; use Unrolled().")
        notes.add(exact=isinstance(method, Unrolled) and not truncated and method.curvature == "hessian")
        if truncated:
            notes.add(steps=last, of_steps=len(self._run))
        count = len(cotangents)
        self._prepare(count, next(iter(cotangents.params.values())))
        pullback, step = None, 0
        for inputs, step, pullback in method.sweep(self._run, cotangents, notes, frozenset(self._names) - {*_WHOLE_RUN}):
            self._add(inputs, step, pullback)
        start = cotangents if pullback is None else pullback.costates
        wrong = [name for name, leaf in start.leaves().items() if not torch.isfinite(leaf).all()]
        if wrong:  # at any other step, the one before it would have shown it
            raise NonFinite(f"the costates became non-finite at step {step}, in {', '.join(wrong[:4])}.")
        if "initial_params" in self._names:
            self.values["initial_params"] = {name: leaf.clone() for name, leaf in start.params.items()}
        return None if isinstance(method, FixedPoint) else start

    def _prepare(self, count: int, like: Tensor) -> None:
        run = self._run
        hyper = {name for own in run.records[-1].hyper for name in own} if run.records else set()
        for name in self._names:
            if name == "example_weights":
                self.values[name] = like.new_zeros(count, len(run.examples))
            elif name in hyper or name == "clip_norm":
                groups = 1 if name == "clip_norm" else len(run.update_map.groups)
                self.values[name] = like.new_zeros(count, *([len(run)] if self._per_step else []), groups)
            elif name == "meta":
                self.values[name] = {own: leaf.new_zeros(count, *leaf.shape) for own, leaf in run.update_map.meta.items()}

    def _add(self, inputs: StepInputs, step: int, pullback: Pullback) -> None:
        rows = self._run.examples.rows(inputs.example_ids)
        if "example_weights" in self._names:
            self.values["example_weights"].index_add_(1, rows.to(pullback.scores.device), pullback.scores)
        for name, leaf in pullback.inputs.hyper.items():
            if self._per_step:
                self.values[name][:, step] += leaf
            else:
                self.values[name] += leaf
        for name, leaf in pullback.inputs.meta.items():
            self.values["meta"][name] += leaf
        for name, leaf in pullback.inputs.batch.items():
            if name not in self.values:
                self.values[name] = leaf.new_zeros(len(leaf), len(self._run.examples), *leaf.shape[2:])
            self.values[name].index_add_(1, rows.to(leaf.device), leaf)


def _inputs(run: Trajectory) -> set[str]:
    return {*_WHOLE_RUN, *(run.update_map.inputs_of(run.inputs(0)) if len(run) else ())}


def _check(run: Trajectory, names: frozenset[str], known: Iterable[str]) -> None:
    if not names:
        raise InputError("wrt names no input. Name one, for example wrt='learning_rate'.")
    known = _inputs(run) if known is names else set(known)
    if not names <= known:
        run.update_map.check_inputs(names - {*_WHOLE_RUN}, run.inputs(0))
        raise InputError(f"{sorted(names - known)} went into no stage. What did: {sorted(known)}.")
