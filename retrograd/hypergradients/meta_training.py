"""Meta-training: change what goes into training until the outcome is good, by gradient descent on hypergradients.

    s_T(z) = training with inputs z,      z ← z − (optimizer's step along) d f(s_T(z)) / d z

z   the variables: meta-parameters, learning rates, weights, data, the start (see ``variables.py``);
f   the outcome, to be made small: usually the loss on data that are not trained on.

| start | each outer step trains | finds |
|---|---|---|
| ``cold`` | from the recorded start, all of the run's steps | z that is good for training anew: what one wants |
| ``warm`` | from where the last outer step ended | z that is good *here*: cheap, but the model keeps what every z taught it |

The alternating method (T1 − T2, DARTS) is a warm start with a run of one step and `FirstOrder()`. Warm-started results must be
audited (`audit`): the model may have memorised what the variables did not learn (Vicol et al. 2022 report 97.5 % in the end of
a warm-started distillation, and 17 % for a model trained anew on the very same distilled data).

Assumptions: those of the method of `hypergradient`. The first question of the outcome counts. A validation outcome on other
data than the outcome's guards against fitting z to it; the best z by it is kept, and ``patience`` stops.
Cost: a training and a hypergradient for each outer step.

References: Maclaurin et al. (2015); Vicol, Lorraine, Pedregosa, Duvenaud, Grosse (2022), "On implicit bias in overparameterized
bilevel optimization", algorithms 1 to 3.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from retrograd.adjoint import Outcome, Queries
from retrograd.errors import InputError, NonFinite, UntrustedGradient
from retrograd.files import read_tensors, write_tensors
from retrograd.hypergradients.chain import Chain
from retrograd.hypergradients.hypergradient import Method, hypergradient
from retrograd.hypergradients.result import Hypergradient
from retrograd.hypergradients.variables import Variables
from retrograd.progress import track
from retrograd.trajectory import TrainingState, Trajectory

Vary = Callable[[int], Mapping[str, Any]]
"""Maps the number of an outer step to keywords of `Trajectory.rerun`: another start, order of batches, or seed."""

FORMAT = 1


@dataclass(frozen=True)
class OuterStep:
    """What one outer step showed: the outcome before its change of the variables, and the validation outcome."""

    outcome: float
    validation: float | None


@dataclass(frozen=True)
class MetaTraining:
    """What `meta_train` found.

    Attributes:
        values: the variables, the best by validation if there is one, else the last; flat by name (`Variables`).
        start: their values before the first outer step.
        history: one entry for each outer step that was made.
        best: number of the outer step before which the variables were ``values``, or None for those after the last.
        run: the training that was made last; with a cold start that with the last variables but one.
        recipe: the run (or chain) that was trained again and again.
        names: the inputs that were changed.
        stage: the stage of a chain whose inputs they are.
    """

    values: dict[str, Tensor]
    start: dict[str, Tensor]
    history: list[OuterStep]
    best: int | None
    run: Trajectory | Chain
    recipe: Trajectory | Chain
    names: tuple[str, ...]
    stage: int = 0

    def train(
        self, recipe: Trajectory | Chain | None = None, values: Mapping[str, Tensor] | None = None, **changes: Any
    ) -> Trajectory | Chain:
        """Train anew, from a cold start, with the variables that were found.

        Args:
            recipe: another training with the same inputs, for example a longer one; the one they were found with if not given.
            values: other variables.
            changes: more keywords of `Trajectory.rerun`, for the stage whose inputs are changed.
        """
        again = self.recipe if recipe is None else recipe
        return trained_with(again, self.names, self.stage, self.values if values is None else values, changes)

    @property
    def meta(self) -> dict[str, Tensor]:
        """The meta-parameters that were found, under their own names."""
        return {name.removeprefix("meta/"): leaf for name, leaf in self.values.items() if name.startswith("meta/")}


@dataclass
class _State:
    """All that an interrupted meta-training needs to go on."""

    values: dict[str, Tensor]
    history: list[OuterStep] = field(default_factory=list)
    best: int | None = None
    best_values: dict[str, Tensor] = field(default_factory=dict)
    ends: list[TrainingState | None] = field(default_factory=list)  # where each stage ended last, for warm starts
    last_values: dict[str, Tensor] = field(default_factory=dict)  # what the last training was made with,
    last_ends: list[TrainingState | None] = field(default_factory=list)  # and where it began


def meta_train(
    run: Trajectory | Chain,
    outcome: Any,
    wrt: str | Iterable[str] = "meta",
    *,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    start: Literal["cold", "warm"] = "cold",
    method: Method | Sequence[Method] | None = None,
    validation: Any = None,
    patience: int | None = None,
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None,
    vary: Vary | None = None,
    stage: int = 0,
    folder: str | PathLike[str] | None = None,
) -> MetaTraining:
    """Improve inputs of training by gradient descent on an outcome.

    Args:
        run: a recorded run, or a `chain`: what is trained again for each outer step.
        outcome: what is to become small, as for `hypergradient`; its first question counts.
        wrt: the inputs to change.
        optimizer: makes the outer optimizer from a list of tensors, for example ``lambda z: torch.optim.Adam(z, lr=0.1)``.
        steps: outer steps, at most.
        start: ``"cold"`` or ``"warm"``, see above.
        method: how hypergradients are obtained; exact unrolling if not given.
        validation: another outcome, on other data: the best variables by it are returned.
        patience: stop after so many outer steps without a better validation outcome.
        penalty: a differentiable function of the variables that is added to the outcome.
        vary: what else differs between outer steps (the stage's start, order of batches, seed), not the variables themselves.
        stage: of a chain: the stage whose inputs are changed.
        folder: where to keep the state: a call with the same arguments continues after the last outer step that was finished.

    Raises:
        InputError: arguments contradict each other, or the run has no such input.
        NonFinite: an outcome or a derivative is not finite.
        CorruptRecord: the state in ``folder`` was altered.
    """
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    stages = run.stages if isinstance(run, Chain) else (run,)
    if patience is not None and validation is None:
        raise InputError("patience needs a validation outcome, on other data than the outcome's.")
    if steps < 1 or not 0 <= stage < len(stages):
        raise InputError(f"steps must be at least 1 and stage below {len(stages)}, got {steps} and {stage}.")
    if start == "warm" and "initial_params" in names:
        raise InputError("a warm start does not begin at initial_params; learn them with start='cold'.")
    variables = Variables(stages[stage], names)
    began = variables.start()
    asked, checked = Outcome.of(outcome), None if validation is None else Outcome.of(validation)
    state = _State({name: leaf.clone().requires_grad_() for name, leaf in began.items()}, ends=[None] * len(stages))
    outer = optimizer(list(state.values.values()))
    file = None if folder is None else Path(folder) / "meta-training.safetensors"
    identity = {"digests": [own.digest for own in stages], "names": list(names), "start": start, "stage": stage}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _load(file, identity, state, outer)

    def trained(number: int, values: Mapping[str, Tensor], ends: list[TrainingState | None]) -> Trajectory | Chain:
        changes, other = variables.changes(values), dict(vary(number)) if vary else {}
        if changes.keys() & other.keys() or (start == "warm" and "initial" in other):
            raise InputError(
                f"vary gives {sorted(other)}; the variables {list(names)} and a {start} start leave it no say in "
                f"{sorted({*changes, *(['initial'] if start == 'warm' else [])} & other.keys())}."
            )
        if start == "warm":
            return _continued(run, stage, changes | other, ends, number)
        return _again(run, stage, changes | other)

    made = run
    for number in track(range(len(state.history), steps), "meta-training"):
        if patience is not None and state.best is not None and number - state.best > patience:
            break
        state.last_values = {name: leaf.detach().clone() for name, leaf in state.values.items()}
        state.last_ends, made = state.ends, trained(number, state.values, state.ends)
        if start == "warm":
            state.ends = [own.final_state for own in (made.stages if isinstance(made, Chain) else (made,))]
        with warnings.catch_warnings():
            if number:  # once is enough
                warnings.simplefilter("ignore", UntrustedGradient)
            every: Any = hypergradient(made, asked, names, method=method)  # type: ignore[call-overload, arg-type]
        found: Hypergradient = every[stage] if isinstance(made, Chain) else every
        now = None if checked is None else _asked(checked, made)
        state.history.append(OuterStep(found.outcome[0].item(), now))
        if now is not None and (state.best is None or now < _known(state.history[state.best].validation)):
            state.best, state.best_values = number, state.last_values
        outer.zero_grad()
        if penalty is not None:
            penalty(state.values).backward()
        for name, own in variables.gradient(found, state.values).items():
            leaf = state.values[name]
            leaf.grad = own.to(leaf) if leaf.grad is None else leaf.grad + own.to(leaf)
        outer.step()
        wrong = [name for name, leaf in state.values.items() if not torch.isfinite(leaf).all()]
        if wrong:
            raise NonFinite(f"the variables became non-finite at outer step {number}, in {', '.join(wrong[:4])}.")
        if file is not None:
            _save(file, identity, state, outer)
    if made is run:  # all steps were made before: the last training once more, for what it ended with
        made = trained(len(state.history) - 1, state.last_values, state.last_ends)
    last = {name: leaf.detach().clone() for name, leaf in state.values.items()}
    return MetaTraining(
        state.best_values if state.best is not None else last, began, state.history, state.best, made, run, names, stage
    )


def trained_with(
    recipe: Trajectory | Chain,
    names: tuple[str, ...],
    stage: int,
    values: Mapping[str, Tensor],
    changes: Mapping[str, Any],
) -> Trajectory | Chain:
    """Train ``recipe`` from a cold start with the variables ``values``."""
    stages = recipe.stages if isinstance(recipe, Chain) else (recipe,)
    return _again(recipe, stage, Variables(stages[stage], names).changes(values) | dict(changes))


def _again(run: Trajectory | Chain, stage: int, changes: Mapping[str, Any]) -> Trajectory | Chain:
    if isinstance(run, Trajectory):
        return run.rerun(**changes)
    return run.rerun(*(changes if number == stage else {} for number in range(len(run))))


def _continued(
    run: Trajectory | Chain, stage: int, changes: Mapping[str, Any], ends: list[TrainingState | None], number: int
) -> Trajectory | Chain:
    """Train every stage on from where it ended last; Adam's count of steps and the meta-module's go on, too."""
    stages = run.stages if isinstance(run, Chain) else (run,)
    every = []
    for place, (own, end) in enumerate(zip(stages, ends, strict=True)):
        options = dict(changes) if place == stage else {}
        if end is not None:
            options["initial"] = replace(end, step=0)
        options["begins_at"] = number * len(own)
        if own.records and "step" in own.records[0].hyper[0]:
            counted = torch.tensor([[float(h["step"]) for h in record.hyper] for record in own.records], dtype=torch.float64)
            options["hyper"] = {**options.get("hyper", {}), "step": counted + number * len(own)}
        every.append(options)
    return run.rerun(*every) if isinstance(run, Chain) else run.rerun(**every[0])


def _asked(outcome: "Outcome | Queries", run: Trajectory | Chain) -> float:
    update_map = (run.stages[-1] if isinstance(run, Chain) else run).update_map
    value = outcome.values(update_map, run.final_state).detach().flatten()[0].item()
    if value != value or value in (float("inf"), float("-inf")):
        raise NonFinite(f"the validation outcome is {value}.")
    return value


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _save(file: Path, identity: dict[str, Any], state: _State, outer: torch.optim.Optimizer) -> None:
    tensors = {f"values/{name}": leaf for name, leaf in state.values.items()}
    tensors |= {f"best/{name}": leaf for name, leaf in state.best_values.items()}
    tensors |= {f"last/{name}": leaf for name, leaf in state.last_values.items()}
    for kind, ends in (("ends", state.ends), ("last_ends", state.last_ends)):
        for place, end in enumerate(ends):
            tensors |= {} if end is None else {f"{kind}/{place}/{name}": leaf for name, leaf in end.tensors().items()}
    numbers: dict[str, dict[str, Any]] = {}
    kept = outer.state_dict()
    for place, own in kept["state"].items():
        for name, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"outer/{place}/{name}"] = value
            else:
                numbers.setdefault(str(place), {})[name] = value
    about = {
        "format": FORMAT,
        **identity,
        "history": [[one.outcome, one.validation] for one in state.history],
        "best": state.best,
        "outer": {"numbers": numbers, "groups": kept["param_groups"]},
    }
    write_tensors(file, tensors, about)


def _load(file: Path, identity: dict[str, Any], state: _State, outer: torch.optim.Optimizer) -> None:
    tensors, about = read_tensors(file)
    asked = {"format": FORMAT, **identity}
    differ = [name for name, value in asked.items() if about.get(name) != value]
    if differ:
        raise InputError(f"{file} is the state of another meta-training: {differ} differ. Give another folder.")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): leaf for name, leaf in tensors.items() if name.startswith(prefix)}

    with torch.no_grad():
        for name, leaf in under("values/").items():
            state.values[name].copy_(leaf)
    state.best, state.best_values, state.last_values = about["best"], under("best/"), under("last/")
    state.history = [OuterStep(*one) for one in about["history"]]
    own = [[under(f"{kind}/{place}/") for place in range(len(state.ends))] for kind in ("ends", "last_ends")]
    state.ends, state.last_ends = [[TrainingState.from_tensors(one, 0) if one else None for one in ends] for ends in own]
    kept: dict[int, dict[str, Any]] = {int(place): dict(own) for place, own in about["outer"]["numbers"].items()}
    for name, leaf in under("outer/").items():
        place, key = name.split("/", 1)
        kept.setdefault(int(place), {})[key] = leaf
    outer.load_state_dict({"state": kept, "param_groups": about["outer"]["groups"]})
