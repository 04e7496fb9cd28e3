"""A recorded training run: the sequence of update maps, walked forward or backward from a few stored states."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError, NonFinite, NotRecorded, ReplayDrift, ReplayMismatch
from retrograd.params import Params
from retrograd.progress import track
from retrograd.trajectory import digests
from retrograd.trajectory.checkpoints import Checkpoints, MemoryCheckpoints, keep_checkpoint
from retrograd.trajectory.counterfactual import Counterfactual
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.modes import step_seed
from retrograd.trajectory.schedule import Schedule, reverse
from retrograd.trajectory.state import ROUNDING, StepInputs, StepRecord, TrainingState, map_batch
from retrograd.trajectory.update_map import UpdateMap
from retrograd.update_rules import AdamW, Lookahead


def smallest(params: Mapping[str, Tensor]) -> Tensor:
    """Return the smallest parameter, the one that `witness` looks at.

    A change of any parameter moves every gradient of the next step, so one small tensor is enough to see it.
    """
    return params[smallest_name(params)]


def smallest_name(params: Mapping[str, Tensor]) -> str:
    """Return the name of the smallest parameter."""
    return min(params, key=lambda name: params[name].numel())


def witness(parameter: Tensor) -> float:
    """Project the smallest parameter on fixed numbers: one number a step by which a replay notices the first that differs.

    A plain sum would not do: the gradients of a classifier's last bias add up to zero, whatever went into them.
    """
    return witnesses([parameter])[0]


def witnesses(parameters: Sequence[Tensor]) -> list[float]:
    """The `witness` of several values of the same parameter; summed exactly, so that the order of sums plays no part."""
    values = torch.stack([leaf.detach().flatten() for leaf in parameters]).double()
    return [math.fsum(row) for row in (values * _fixed(values.shape[1], values.device)).tolist()]


@lru_cache
def _fixed(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64, device=device).cos()


@runtime_checkable
class Run(Protocol):
    """What every method can ask of a run, replayable or not."""

    update_map: UpdateMap
    examples: Examples
    counterfactual: Counterfactual

    def __len__(self) -> int:
        """Return the number of steps."""
        ...

    @property
    def digest(self) -> str:
        """Digest of everything that went into the run."""
        ...

    @property
    def final_state(self) -> TrainingState:
        """The state after the last step."""
        ...

    def state(self, step: int) -> TrainingState:
        """Return the state before ``step``."""
        ...

    def spread(self, count: int) -> list[int]:
        """Return ``count`` checkpoints spread over the run."""
        ...

    def exposure(self, steps: Sequence[int], stops: Sequence[int] | None = None) -> Float[Tensor, "checkpoint example"]:
        """Learning rate over batch size, summed over each example's visits nearest to each checkpoint, or before each stop."""
        ...

    def step_size(self, state: TrainingState, name: str) -> Tensor | float:
        """Return −dθ/dg of a parameter for a learning rate of 1."""
        ...

    @property
    def mean_weight(self) -> float:
        """Mean weight of an example over all visits."""
        ...

    @property
    def weight_decay(self) -> float:
        """Weight decay that acts like a term of the loss, ½ λ ‖θ‖², averaged over the steps."""
        ...

    @property
    def shrinkage(self) -> float:
        """Weight decay that shrinks parameters past the preconditioner, averaged over the steps."""
        ...

    def matching(self, counterfactual: Counterfactual) -> "Run":
        """Return the run at which to linearise for this counterfactual."""
        ...


class Trajectory:
    """A recorded run. Made by `record`, `Recorder` or `open_run`; every question is asked of it.

    Attributes:
        update_map: Φ.
        examples: the training examples.
        records: one `StepRecord` for each step.
        checkpoints: the stored states.
        schedule: how many states a replay may hold.
        tolerance: how far a replayed update may be from the recorded one, as a share of its size, beyond rounding.
        counterfactual: the change of the data that this run is the right place to linearise for.
        parents: runs whose outcome this run started from.
        begins_at: what a meta-module is told as the number of the first step.
    """

    def __init__(
        self,
        update_map: UpdateMap,
        examples: Examples,
        records: Sequence[StepRecord],
        checkpoints: Checkpoints,
        schedule: Schedule,
        *,
        tolerance: float = 1e-5,
        counterfactual: Counterfactual | None = None,
        parents: "Sequence[Trajectory]" = (),
        begins_at: int = 0,
    ):
        self.update_map, self.examples, self.records = update_map, examples, list(records)
        self.checkpoints, self.schedule, self.tolerance = checkpoints, schedule, tolerance
        self.counterfactual = counterfactual or Counterfactual()
        self.parents, self.begins_at = tuple(parents), begins_at
        self._compared: set[int] = set()  # steps of stored states that a walk has been compared with already
        self.drift = 0.0  # how far a replayed update was from the recorded one at most; 0: bit for bit so far

    def __len__(self) -> int:
        """Return the number of steps T."""
        return len(self.records)

    def __repr__(self) -> str:
        """Say what was recorded, on one line."""
        return (
            f"<Trajectory of {len(self)} steps, {type(self.update_map.rule).__name__}, {len(self.examples)} examples, "
            f"{len(self.checkpoints.steps())} stored states>"
        )

    @property
    def digest(self) -> str:
        """Head of the chain of digests over everything that went into the run."""
        return digests.chain(self.genesis(), self.records)[-1] if self.records else self.genesis()

    def genesis(self) -> str:
        """Digest of what was there before the first step: model, task, optimizer, data and the initial state."""
        return digests.genesis(self.update_map, self.examples, self.checkpoints.load(0))

    # ------------------------------------------------------------------ walking

    def inputs(self, step: int) -> StepInputs:
        """Return the inputs u_t of a step, with the batch read from the data set."""
        if not 0 <= step < len(self):
            raise NotRecorded(f"step {step} is not recorded. Recorded steps: 0 to {len(self) - 1}.")
        record = self.records[step]
        batch = to_device(self.examples.batch(record.example_ids), self.device)
        return StepInputs(record.example_ids, record.weights, record.hyper, batch, record.seed, self.begins_at + step)

    def state(self, step: int) -> TrainingState:
        """Return the state s_t before step ``t``, 0 ≤ t ≤ T, replayed from the nearest stored state before it."""
        if not 0 <= step <= len(self):
            raise NotRecorded(f"there is no state {step}. A run of {len(self)} steps has states 0 to {len(self)}.")
        base = max(stored for stored in self.checkpoints.steps() if stored <= step)
        state = self._load(base)
        for current in range(base, step):
            state = self.advance(state, current)
        return state

    def advance(self, state: TrainingState, step: int) -> TrainingState:
        """Replay one step and compare with what was recorded of it.

        Raises:
            ReplayMismatch: the replay is further from the record than `tolerance`.
        """
        after = self.update_map(state, self.inputs(step))
        expected = self.records[step].witness
        if expected is not None:
            self._compare(state, after, expected, step)
        return after

    def reverse(self, last: int | None = None) -> Iterator[tuple[int, TrainingState, StepInputs]]:
        """Yield ``(t, s_t, u_t)`` for t = T−1 … 0, or only for the ``last`` so many steps."""
        stop, lowest = len(self), 0 if last is None else max(len(self) - last, 0)
        for base in reversed(self.checkpoints.steps()):
            if base >= stop:
                continue
            first = self._load(base)
            slots = self.schedule.slots(first.nbytes())
            for step, state in reverse(first, base, stop, self.advance, slots):
                if step < lowest:
                    return
                if step == stop - 1:
                    self._compare_stored(first, state, step)
                yield step, state, self.inputs(step)
            stop = base

    @property
    def final_state(self) -> TrainingState:
        """The state after the last step."""
        return self.state(len(self))

    def measurements(self, batch: Any) -> Float[Tensor, " query"]:
        """Evaluate the task's measurements on ``batch`` at the end of the run."""
        return self.update_map.measurements(self.final_state, to_device(batch, self.device)).detach()

    # ------------------------------------------------------------------ what the steps add up to

    def spread(self, count: int) -> list[int]:
        """Return the middles of ``count`` equal stretches of the run, as steps."""
        return [(2 * index + 1) * len(self) // (2 * count) for index in range(count)]

    def exposure(self, steps: Sequence[int], stops: Sequence[int] | None = None) -> Float[Tensor, "checkpoint example"]:
        """Learning rate over batch size, summed over the visits of each example in the window of each checkpoint.

        The learning rate is that of the first parameter group; `step_size` has the others' share.

        Args:
            steps: the checkpoints.
            stops: where each window ends; halfway to the next checkpoint if not given.
        """
        stops = [*((left + right + 1) // 2 for left, right in pairwise(steps)), len(self)] if stops is None else stops
        exposure = torch.zeros(len(steps), len(self.examples), dtype=torch.float64)
        window = 0
        for step, record in enumerate(self.records):
            while step >= stops[window]:
                window += 1
            each = float(record.hyper[0]["learning_rate"]) / len(record.example_ids)
            visits = torch.full(record.example_ids.shape, each, dtype=torch.float64)
            exposure[window].index_add_(0, self.examples.rows(record.example_ids), visits)
        return exposure

    def step_size(self, state: TrainingState, name: str) -> Tensor | float:
        """Return −dθ/dg of the parameter ``name`` at ``state``, for a learning rate of 1 in the first group."""
        # The preconditioner that a gradient meets is the one after its step; before the first step there is none yet.
        after = state if state.step else self.state(1)
        hyper = self.records[after.step - 1].hyper
        group = self.update_map.group_of(name)
        # Where a rule has dampening, its first step has none (see `SGD`); the later ones decide the long run.
        lasting = {key: value for key, value in self.records[-1].hyper[group].items() if key == "dampening"}
        own = {**hyper[group], **lasting}
        slots = {slot: after.slots[slot][name] for slot in self.update_map.rule.slots}
        return self.update_map.rule.step_size(slots, own) / hyper[0]["learning_rate"]

    @property
    def mean_weight(self) -> float:
        """Mean weight of an example over all visits."""
        weights = [1.0 if record.weights is None else record.weights.mean().item() for record in self.records]
        return sum(weights) / max(len(weights), 1)

    @property
    def weight_decay(self) -> float:
        """Weight decay that acts like a term of the loss, ½ λ ‖θ‖²: that of the first group, averaged over the steps.

        AdamW's is none: it shrinks parameters past the preconditioner.
        """
        return 0.0 if self._decoupled else self._mean_decay()

    @property
    def shrinkage(self) -> float:
        """Weight decay that shrinks parameters past the preconditioner, as AdamW's; averaged over the steps."""
        return self._mean_decay() if self._decoupled else 0.0

    @property
    def _decoupled(self) -> bool:
        rule = self.update_map.rule
        return isinstance(rule.rule if isinstance(rule, Lookahead) else rule, AdamW)

    def _mean_decay(self) -> float:
        decays = [float(record.hyper[0].get("weight_decay", 0.0)) for record in self.records]
        return sum(decays) / max(len(decays), 1)

    # ------------------------------------------------------------------ running again

    def rerun(
        self,
        *,
        weights: Float[Tensor, " example"] | None = None,
        learning_rate_scale: float = 1.0,
        hyper: Mapping[str, Float[Tensor, "*step group"]] | None = None,
        clip_norm: float | None = None,
        meta: Params | None = None,
        examples: Examples | None = None,
        order: Sequence[Tensor] | None = None,
        seed: int | None = None,
        initial: TrainingState | None = None,
        begins_at: int | None = None,
        schedule: Schedule | None = None,
        counterfactual: Counterfactual | None = None,
    ) -> "Trajectory":
        """Train again from the same start, on the same batches and random numbers unless told otherwise, with other inputs.

        Args:
            weights: factor on each example's recorded weight, in the order of ``examples.ids``.
            learning_rate_scale: factor on every learning rate.
            hyper: other values of hyperparameters: for each group, or for each step and group.
            clip_norm: another norm to clip gradients to.
            meta: other meta-parameters.
            examples: other contents of the same examples.
            order: ids of each step's batch; recorded weights of the steps then do not apply.
            seed: another seed of the random numbers inside the steps.
            initial: another initial state.
            begins_at: what a meta-module is told as the number of the first step.
            schedule: which states to keep, in memory; that of this run if not given.
            counterfactual: what the new run is the linearisation point of.

        Raises:
            InputError: shapes do not fit this run, or it has no such input.
        """
        schedule = schedule or self.schedule
        if examples is not None and not torch.equal(examples.ids, self.examples.ids):
            raise InputError("other contents must be of the same examples: give Examples(data, ids=run.examples.ids).")
        update_map = self.update_map if meta is None else self.update_map.with_meta(meta)
        update_map = update_map if clip_norm is None else update_map.with_clip_norm(clip_norm)
        self._check_hyper(hyper or {})
        if order is not None and len(order) != len(self):
            raise InputError(f"order needs the batches of {len(self)} steps, got {len(order)}.")
        checkpoints = MemoryCheckpoints()
        state = self._load(0) if initial is None else replace(initial, step=0)
        if weights is not None and weights.shape != (len(self.examples),):
            raise InputError(
                f"weights must have one entry an example, shape ({len(self.examples)},), got {tuple(weights.shape)}."
            )
        rerun = Trajectory(
            update_map,
            self.examples if examples is None else examples,
            [],
            checkpoints,
            schedule,
            tolerance=self.tolerance,
            counterfactual=counterfactual,
            parents=self.parents,
            begins_at=self.begins_at if begins_at is None else begins_at,
        )
        keep_checkpoint(checkpoints, schedule, state)
        for step in track(range(len(self)), "training again"):
            record = self.records[step]
            if order is not None:
                record = replace(record, example_ids=torch.as_tensor(order[step], dtype=torch.int64), weights=None)
            if seed is not None:
                record = replace(record, seed=step_seed(seed, step))
            if weights is not None:
                factor = weights[self.examples.rows(record.example_ids)].double()
                record = replace(record, weights=factor if record.weights is None else record.weights * factor)
            if learning_rate_scale != 1.0:
                scaled = tuple({**own, "learning_rate": own["learning_rate"] * learning_rate_scale} for own in record.hyper)
                record = replace(record, hyper=scaled)
            for name, values in (hyper or {}).items():
                own = values if values.dim() == 1 else values[step]
                record = replace(record, hyper=tuple({**h, name: v} for h, v in zip(record.hyper, own.tolist(), strict=True)))
            rerun.records.append(replace(record, loss=None, witness=None))
            state = update_map(state, rerun.inputs(step))
            mark = witness(smallest(state.params))
            if not math.isfinite(mark):
                raise NonFinite(f"training again became non-finite at step {step}; use smaller changes.")
            rerun.records[step] = replace(rerun.records[step], witness=mark)
            keep_checkpoint(checkpoints, schedule, state, last=step + 1 == len(self))
        rerun._compared.update(checkpoints.steps())  # made by this very map, a moment ago
        return rerun

    def matching(self, counterfactual: Counterfactual) -> "Trajectory":
        """Return the run at which to linearise for this counterfactual: this run, or one of matched training time.

        Raises:
            InputError: this run is already matched to another counterfactual.
        """
        if counterfactual == self.counterfactual or counterfactual.keep == self.counterfactual.keep == 1.0:
            return self
        if self.counterfactual.keep != 1.0:
            raise InputError(
                f"this run was recorded for {self.counterfactual}; it cannot stand for {counterfactual}. Record a run with "
                "keep=1 and let each question choose, or ask for the counterfactual that the run was recorded for."
            )
        scale, weight = counterfactual.matched_inputs()
        weights = None if weight == 1.0 else torch.full((len(self.examples),), weight, dtype=torch.float64)
        return self.rerun(weights=weights, learning_rate_scale=scale, counterfactual=counterfactual)

    def _check_hyper(self, hyper: Mapping[str, Tensor]) -> None:
        groups = len(self.update_map.groups)
        allowed = sorted(set.intersection(*({*own} for own in self.records[0].hyper))) if self.records else []
        for name, values in hyper.items():
            if name not in allowed:
                raise InputError(f"this run has no hyperparameter {name!r}. Allowed: {allowed}.")
            if values.shape not in ((groups,), (len(self), groups)):
                raise InputError(
                    f"{name} needs one number a group, shape ({groups},), or one a step and group, ({len(self)}, {groups}); "
                    f"got {tuple(values.shape)}."
                )

    # ------------------------------------------------------------------ inside

    @property
    def device(self) -> torch.device:
        """Where the model lives, and so every replay."""
        return next(self.update_map.model.parameters()).device

    def _load(self, step: int) -> TrainingState:
        state = self.checkpoints.load(step).map(lambda leaf: leaf.to(self.device))
        return replace(state, params={name: state.params[name] for name in self.update_map.names})

    def _compare_stored(self, first: TrainingState, before: TrainingState, step: int) -> None:
        """Replay the last step before a stored state and compare all of it, once; the walk itself has no need of this step.

        What a player holds in another's turn has no move of this step to be compared with: its rounding is that of all steps
        since the replay began, at ``first``, and so is its move.
        """
        if step + 1 in self._compared:
            return
        stored = self._load(step + 1)
        after = self.advance(before, step)
        if not after.equals(stored):
            difference = after.difference(stored, self._moved_from(first, before, step))
            self._judge(difference, step)
            self._note_drift(difference, step)
        self._compared.add(step + 1)

    def _compare(self, before: TrainingState, after: TrainingState, expected: float, step: int) -> None:
        mark_name = smallest_name(after.params)
        mark = after.params[mark_name]
        found = witness(mark)
        if found == expected or not self.update_map.gradient.moves([mark_name], self.begins_at + step):
            return  # a player that does not move still carries the rounding of earlier steps: nothing to judge this one by
        # What counts is how wrong the step itself is: a small error beside the parameter may be all of a small update.
        moved = abs(expected - witness(before.params[mark_name]))
        rounding = ROUNDING * torch.finfo(mark.dtype).eps * mark.detach().abs().sum(dtype=torch.float64).item()
        difference = max(abs(found - expected) - rounding, 0.0) / max(moved, torch.finfo(torch.float64).tiny)
        self._judge(difference, step)
        self._note_drift(abs(found - expected) / max(moved, torch.finfo(torch.float64).tiny), step)

    def _moved_from(self, first: TrainingState, before: TrainingState, step: int) -> TrainingState:
        """Return ``before``, with what does not move in this step, because its player does not, as it is in ``first``."""
        movers = {name for own in self.update_map.gradient.movers(self.begins_at + step).values() for name in own}

        def mixed(early: Mapping[str, Tensor], late: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: late[name] if name in movers else early[name] for name in late}

        slots = {slot: mixed(first.slots[slot], leaves) for slot, leaves in before.slots.items()}
        return replace(before, params=mixed(first.params, before.params), slots=slots)

    def _judge(self, difference: float, step: int) -> None:
        if not difference <= self.tolerance:
            raise ReplayMismatch(
                f"replaying step {step} gives an update that differs from the recorded one by {difference:.1e} of its size "
                f"(allowed: {self.tolerance:.0e}). Either the loop did something at this step that the record does not know, "
                "or the replay runs on other hardware or another torch: then raise the run's tolerance."
            )

    def _note_drift(self, difference: float, step: int) -> None:
        if self.drift == 0.0:
            warnings.warn(f"replays of this run are not bit for bit, first seen at step {step}.", ReplayDrift, stacklevel=4)
        self.drift = max(self.drift, difference, torch.finfo(torch.float32).tiny)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to ``device``."""
    return batch if device.type == "cpu" else map_batch(lambda leaf: leaf.to(device), batch)
