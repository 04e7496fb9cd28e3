"""Record an ordinary training loop while it runs, and check that the record is true.

    recorder = Recorder(model, dataset, task, optimizer, folder="runs/digits")
    for ids in batches:
        inputs, labels = dataset[ids]
        with recorder.step(ids):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        scheduler.step()
    run = recorder.finish()

Nothing about the loop changes, except that the random numbers drawn inside a step come from that step's recorded seed.
The recorder **checks itself**: at steps 0, 1, 4, 16, 64, … it replays the step from the record alone and compares all
tensors with what really happened; between steps it looks whether anything else wrote to the model; and every later replay
compares one number a step (`trajectory.witness`). So a loop that does something the record does not know (another
loss, clipping it was not told of, augmentation, noise on gradients) is found, with the step and how far off.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.directions import Direction
from retrograd.errors import (
    CorruptRecord,
    InputError,
    NonFinite,
    ReplayMismatch,
    UnsupportedTraining,
)
from retrograd.game import AnyGame
from retrograd.task import AnyTask
from retrograd.trajectory import digests
from retrograd.trajectory.background_writer import BackgroundWriter
from retrograd.trajectory.checkpoints import MemoryCheckpoints, keep_checkpoint
from retrograd.trajectory.counterfactual import Counterfactual
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.modes import seeded, step_seed
from retrograd.trajectory.refusals import check_same_run, refuse_hooks, refuse_scaler
from retrograd.trajectory.schedule import Schedule, Sqrt
from retrograd.trajectory.state import StepInputs, StepRecord, TrainingState
from retrograd.trajectory.step_gradient import direction_of
from retrograd.trajectory.store import FORMAT, RunFolder
from retrograd.trajectory.trajectory import Trajectory, smallest, to_device, witnesses
from retrograd.trajectory.update_map import UpdateMap
from retrograd.update_rules import TorchRule, rule_of

_SETTLED_TOGETHER = 256  # steps; what a memory recording has not settled yet waits for that many


class Step:
    """Handle of the step that is being recorded; set `loss` to have it in the record."""

    loss: Any = None

    def __init__(self, seed: int):
        self.seed = seed


class Recorder:
    """Records a user's training loop.

    Args:
        model: the module that is trained.
        dataset: its training examples (anything that `Examples` takes).
        task: the same loss that the loop minimises, per example.
        optimizer: the loop's ``torch.optim`` optimizer, over parameters of ``model``; several of them, of one kind, where
            every step of the record is a step of one of them (a game with turns).
        clip_norm: the norm given to ``clip_grad_norm_`` in the loop, if there is such a call.
        checkpoints: which states are kept.
        folder: where to write the run; None keeps it in memory.
        resume: continue the run in ``folder`` if there is one: model and optimizer are set to its last stored state, and
            `steps_done` says how many steps the loop must skip.
        seed: seed of the steps' random numbers.
        tolerance: how far a replayed update may be from the real one, as a share of its size, beyond rounding. Arithmetic in
            another order (a fused optimizer, another reduction of the loss) stays far below the default.
        check_every: replay every so many steps, instead of steps 0, 1, 2, 4, 8, …
        counterfactual: what the run is the linearisation point of, if its learning rates were chosen to match one.
        meta: the meta-module that the task's losses take (see `retrograd.task.Meta`); its parameters must stay as they are
            while the model trains.
        direction: what the loop steps along instead of the gradient (see `retrograd.directions`); an `ExtraGradient` optimizer
            says so itself.

    Raises:
        UnknownOptimizer: no update rule equals the optimizer.
        UnsupportedHook: the model or the optimizer has hooks that change gradients or parameters.
        RecordExists: ``folder`` holds a run and ``resume`` is not set.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        task: AnyTask | AnyGame,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        clip_norm: float | None = None,
        checkpoints: Schedule | None = None,
        folder: str | PathLike[str] | None = None,
        resume: bool = False,
        seed: int = 0,
        tolerance: float = 1e-5,
        check_every: int | None = None,
        counterfactual: Counterfactual | None = None,
        meta: nn.Module | None = None,
        direction: Direction | None = None,
    ):
        self._optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
        self._rule = rule = _one_rule(self._optimizers)
        for own in self._optimizers:
            refuse_hooks(model, own)
        self.model, self.optimizer, self.seed = model, optimizer, seed
        for own in self._optimizers:
            direction = direction or direction_of(own)
        self.schedule = checkpoints or Sqrt()
        self._groups = _group_names(model, self._param_groups)
        self._params = dict(model.named_parameters())
        in_groups = {name for group in self._groups for name in group}
        self._trained = {name: leaf for name, leaf in self._params.items() if name in in_groups}
        self._watched = [*self._params.values(), *model.buffers()]
        evaluation = [name for name, module in model.named_modules() if not module.training]
        self._trajectory = Trajectory(
            UpdateMap(model, task, rule, self._groups, clip_norm, evaluation, meta, direction),
            Examples.of(dataset),
            [],
            RunFolder(folder) if folder is not None else MemoryCheckpoints(),
            self.schedule,
            tolerance=tolerance,
            counterfactual=counterfactual,
        )
        _check_groups(self.update_map, self._groups)
        self._check_every = check_every
        self._mark = smallest(self._trained)
        self._pending: list[tuple[Tensor, Tensor | None, tuple[dict[str, float], ...], int, Tensor | float | None, Tensor]] = []
        self._hyper: tuple[dict[str, float], ...] | None = None
        self._inside = self._looked = self._reopens = False
        self._writer = BackgroundWriter()
        self._chain: list[str] = []
        if resume and self._folder is not None and self._folder.exists():
            self._continue()
        else:
            self._begin()
        self._versions = self._tensor_versions()
        self._hooks = [own.register_step_pre_hook(self._before_optimizer_step) for own in self._optimizers]

    @property
    def steps_done(self) -> int:
        """Number of steps that are recorded; after ``resume`` the loop goes on with this step."""
        return len(self._trajectory.records) + len(self._pending)

    @property
    def update_map(self) -> UpdateMap:
        """The update map of the recorded steps."""
        return self._trajectory.update_map

    @property
    def records(self) -> list[StepRecord]:
        """The steps that are recorded and settled; after ``resume``, those that were read from the folder."""
        return self._trajectory.records

    # ------------------------------------------------------------------ one step

    @contextmanager
    def step(self, example_ids: Tensor | Sequence[int], weights: Tensor | None = None) -> Iterator[Step]:
        """Record one step: forward, backward, clipping and one ``optimizer.step()`` happen inside.

        Args:
            example_ids: ids of the examples of the batch, shape ``[B]``.
            weights: their weights if the loss is weighted, shape ``[B]``.

        Raises:
            UnsupportedTraining: something outside of a step wrote to the model, or the step made no or two updates.
            ReplayMismatch: replaying the step from the record gives something else.
        """
        number = self.steps_done
        ids = torch.as_tensor(example_ids, dtype=torch.int64).detach().cpu()
        if self._tensor_versions() != self._versions:
            raise UnsupportedTraining(
                f"parameters or buffers were written to between step {number - 1} and step {number}, outside of "
                "recorder.step(...). The record cannot know of that. Common causes: evaluating in training mode (batch norm "
                "moves its statistics; call model.eval() first), weight averaging, loading weights."
            )
        before = self._live_state(number).clone() if self._is_checked(number) else None
        self._hyper, seed = None, step_seed(self.seed, number)
        handle = Step(seed)
        self._inside = True
        try:
            with seeded(seed, self._trained):
                yield handle
        finally:
            self._inside = False
        if self._hyper is None:
            raise UnsupportedTraining(
                f"step {number} made no update: optimizer.step() must be called inside recorder.step(...)."
            )
        kept = None if weights is None else weights.detach().cpu().double()
        # This runs at every step of somebody's training: what can wait is left to `_settle`.
        self._pending.append((ids, kept, self._hyper, seed, handle.loss, self._mark.detach().clone()))
        self._versions = self._tensor_versions()
        if before is not None:
            self._check(before, number)
        interval = self.schedule.interval(number + 1)
        if interval is not None and (number + 1) % interval == 0:
            self._store(last=False)

    def finish(self) -> Trajectory:
        """Write what is left and return the recorded run."""
        try:
            if self.steps_done:
                self._store(last=True)
        finally:
            self.close()
        if self._folder is not None:
            self._folder.write_manifest(self._manifest("complete"))
        return self._trajectory

    def close(self) -> None:
        """Let go of the optimizer without finishing; what is on disk can be resumed. `finish` does this by itself."""
        for hook in self._hooks:
            hook.remove()
        self._writer.close()

    def set_gradients(self, ids: Tensor, weights: Tensor | None, batch: Any, seed: int) -> Tensor:
        """Do what ``loss.backward()`` does where there is no one loss: in a game, or with a direction. Returns the loss."""
        number = self.steps_done
        # A direction asks for the learning rates only; the rest may yet change, once it is known who has a gradient.
        inputs = StepInputs(ids, weights, self._coming_hyper(), batch, seed, number)
        grads, buffers, loss = self.update_map.step_gradient(self._live_state(number), inputs)
        with torch.no_grad():
            for name, leaf in self._trained.items():
                leaf.grad = grads.get(name)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return loss

    # ------------------------------------------------------------------ checks

    def _coming_hyper(self) -> tuple[dict[str, float], ...]:
        """Return the hyperparameters of the coming update, group by group."""
        return tuple(
            self._rule.hyper_from_torch(group, self._state_of_first_with_gradient(group)) for group in self._param_groups
        )

    def _state_of_first_with_gradient(self, group: dict[str, Any]) -> dict[str, Any]:
        # A parameter without gradient is not stepped, so its count of steps stands still.
        return next((self._slots_of(leaf) for leaf in group["params"] if leaf.grad is not None), {})

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for own in self._optimizers for group in own.param_groups]

    def _slots_of(self, parameter: Tensor) -> dict[str, Any]:
        return next((own.state[parameter] for own in self._optimizers if parameter in own.state), {})

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        number = self.steps_done
        if not self._inside:
            raise UnsupportedTraining(f"optimizer.step() was called after step {number - 1}, outside of recorder.step(...).")
        if self._hyper is not None:
            raise UnsupportedTraining(
                f"step {number} calls optimizer.step() twice; wrap each update in its own recorder.step(...)."
            )
        if not self._looked:
            self._looked = True
            refuse_hooks(self.model, optimizer, ours=1)
            refuse_scaler()
        self._hyper = self._coming_hyper()

    def _is_checked(self, number: int) -> bool:
        if self._check_every is not None:
            return number % self._check_every == 0
        return number <= 1 or (number & (number - 1) == 0 and number.bit_length() % 2 == 1)

    def _check(self, before: TrainingState, number: int) -> None:
        ids, weights, hyper, seed, *_ = self._pending[-1]
        trajectory = self._trajectory
        batch = to_device(trajectory.examples.batch(ids), trajectory.device)
        replayed = trajectory.update_map(before, StepInputs(ids, weights, hyper, batch, seed, number))
        happened = self._live_state(number + 1)
        if replayed.equals(happened):
            return
        difference = replayed.difference(happened, before)
        if not difference <= trajectory.tolerance:
            raise ReplayMismatch(
                f"step {number} does not replay: parameters, optimizer slots or buffers differ by {difference:.1e} of what the "
                f"step changed (allowed: {trajectory.tolerance:.0e}). The loop did something the record does not know. "
                "Compare the task's losses with the loop's loss (same reduction: a mean over the batch); tell the recorder of "
                "gradient clipping (clip_norm=) and of example weights (step(ids, weights=...)); move random augmentation and "
                "regularisation terms into the task's losses."
            )
        trajectory.drift = max(trajectory.drift, difference)

    def _tensor_versions(self) -> list[int]:
        # torch counts in-place writes to each tensor; reading the counts costs next to nothing.
        return [tensor._version for tensor in self._watched]

    # ------------------------------------------------------------------ state and storage

    @property
    def _folder(self) -> RunFolder | None:
        store = self._trajectory.checkpoints
        return store if isinstance(store, RunFolder) else None

    def _live_state(self, number: int) -> TrainingState:
        """Return the state as the model and the optimizer hold it now (not a copy)."""
        params = {name: leaf.detach() for name, leaf in self._trained.items()}
        slots: dict[str, dict[str, Tensor]] = {}
        for slot in self._rule.slots:
            key = self._rule.torch_slots[slot]
            found = {name: self._slots_of(self._params[name]).get(key) for name in params}
            slots[slot] = {name: torch.zeros_like(params[name]) if leaf is None else leaf for name, leaf in found.items()}
        buffers = {name: leaf.detach() for name, leaf in self.model.named_buffers()}
        return TrainingState(params, slots, buffers, number)

    def _settle(self) -> None:
        """Move the numbers of the pending steps off the device and into the record."""
        if not self._pending:
            return
        self._trajectory.examples.rows(torch.cat([ids for ids, *_ in self._pending]))
        pending, self._pending = self._pending, []
        marks = witnesses([mark for *_, mark in pending])
        for (ids, weights, hyper, seed, given, _), found in zip(pending, marks, strict=True):
            loss = given.detach().item() if isinstance(given, Tensor) else given
            if not math.isfinite(found) or (loss is not None and not math.isfinite(loss)):
                raise NonFinite(
                    f"training became non-finite at step {len(self._trajectory.records)} (loss {loss}). The steps before "
                    "the last stored state are kept; lower the learning rate or clip gradients."
                )
            self._trajectory.records.append(StepRecord(ids, weights, hyper, seed, loss, found))

    def _store(self, last: bool) -> None:
        trajectory, folder = self._trajectory, self._folder
        if folder is not None or last or len(self._pending) >= _SETTLED_TOGETHER:
            self._settle()
        state = self._live_state(self.steps_done).clone()
        if not torch.isfinite(torch.nn.utils.get_total_norm(state.params.values())):  # one look at all; it may overflow
            wrong = [name for name, leaf in state.params.items() if not torch.isfinite(leaf).all()]
            if wrong:
                raise NonFinite(
                    f"training became non-finite at step {state.step - 1} at the latest (parameters {wrong[:3]}). The states "
                    "stored before are kept; lower the learning rate or clip gradients."
                )
        if folder is None:
            keep_checkpoint(trajectory.checkpoints, self.schedule, state, last)
            return
        first, records = len(self._chain), trajectory.records[len(self._chain) :]
        chain = digests.chain(self._chain[-1] if self._chain else self._genesis, records)
        self._chain += chain

        reopening = self._manifest("recording") if self._reopens and records else None
        self._reopens = self._reopens and not records

        def write() -> None:
            if reopening is not None:  # a complete run stays complete until there is something to add
                folder.write_manifest(reopening)
            if records:
                folder.write_steps(first, records, chain, digests.state_digest(state))
                keep_checkpoint(folder, self.schedule, state, last)

        self._writer.submit(write)

    def _begin(self) -> None:
        state = self._live_state(0).clone()
        if self._folder is None:
            self._trajectory.checkpoints.save(state)
            return
        self._genesis = digests.genesis(self._trajectory.update_map, self._trajectory.examples, state)
        self._initial = digests.state_digest(state)
        self._folder.create(self._manifest("recording"), self._trajectory.examples, state, self._trajectory.update_map.meta)
        self._folder.expect(0, self._initial)

    def _continue(self) -> None:
        folder, trajectory = self._folder, self._trajectory
        assert folder is not None
        folder.clean()
        manifest = folder.manifest()
        check_same_run(manifest, trajectory.update_map, trajectory.examples)
        if manifest["seed"] != self.seed:
            raise InputError(
                f"this run was recorded with seed={manifest['seed']}; it cannot be continued with seed={self.seed}."
            )
        self._genesis, self._initial = manifest["genesis"], manifest["initial"]
        last = folder.steps()[-1]
        records = folder.read_steps(self._genesis)
        folder.expect(0, self._initial)
        if last > len(records):
            raise CorruptRecord(f"{folder.path} stores the state of step {last} but records only {len(records)} steps.")
        folder.drop_steps(last)
        trajectory.records = records[:last]
        self._chain = digests.chain(self._genesis, trajectory.records)
        self._set_live_state(folder.load(last))
        self._reopens = manifest["status"] == "complete"

    def _set_live_state(self, state: TrainingState) -> None:
        with torch.no_grad():
            for name, leaf in state.params.items():
                self._params[name].copy_(leaf)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state.buffers[name])
        if state.step == 0:
            return
        gradient = self.update_map.gradient
        for index, group in enumerate(self._groups):
            moved = (number for number in reversed(range(state.step)) if gradient.moves(group, number))
            last = next(moved, None)
            if last is None:
                continue
            hyper = self._trajectory.records[last].hyper
            for name in group:
                parameter = self._params[name]
                own: dict[str, Any] = {
                    self._rule.torch_slots[slot]: leaves[name].to(parameter) for slot, leaves in state.slots.items()
                }
                if "step" in hyper[index]:
                    own["step"] = torch.tensor(float(hyper[index]["step"]))
                owner = next(
                    one for one in self._optimizers if any(parameter is p for g in one.param_groups for p in g["params"])
                )
                owner.state[parameter] = own

    def _manifest(self, status: str) -> dict[str, Any]:
        trajectory = self._trajectory
        counterfactual = trajectory.counterfactual
        return {
            "format": FORMAT,
            "versions": {"torch": str(torch.__version__), "python": sys.version.split()[0]},
            **digests.description(trajectory.update_map),
            "data": {"count": len(trajectory.examples), "root": trajectory.examples.root()},
            "seed": self.seed,
            "tolerance": trajectory.tolerance,
            "counterfactual": [counterfactual.keep, counterfactual.removal, counterfactual.seeds],
            "initial": self._initial,
            "genesis": self._genesis,
            "status": status,
            "steps": len(trajectory.records),
            "head": self._chain[-1] if self._chain else self._genesis,
            "checkpoints": [] if status == "recording" else trajectory.checkpoints.steps(),
        }


def _one_rule(optimizers: Sequence[torch.optim.Optimizer]) -> TorchRule:
    rules = [rule_of(optimizer) for optimizer in optimizers]
    if not rules or any(rule != rules[0] for rule in rules):
        raise InputError(
            f"the optimizers of one run must be of one kind, with the same options; got {rules}. Numbers such as lr and betas "
            "may differ."
        )
    return rules[0]


def _check_groups(update_map: UpdateMap, groups: Sequence[Sequence[str]]) -> None:
    gradient = update_map.gradient
    for index, group in enumerate(groups):
        own = [player for player, names in gradient.players.items() if set(names) & set(group)]
        if len(gradient.turns) > 1 and len(own) > 1:
            raise InputError(
                f"group {index} of the optimizer has parameters of {own}, who do not always move in the same steps. Give each "
                "player a parameter group of its own."
            )


def _group_names(model: nn.Module, param_groups: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    names = {id(leaf): name for name, leaf in model.named_parameters()}
    groups = []
    for index, group in enumerate(param_groups):
        unknown = sum(id(leaf) not in names for leaf in group["params"])
        if unknown:
            raise InputError(
                f"group {index} of the optimizer has {unknown} tensors that are not parameters of the model. Everything "
                "that is trained must be a parameter of the one module that is recorded; join modules in an nn.ModuleDict."
            )
        groups.append(tuple(names[id(leaf)] for leaf in group["params"] if leaf.requires_grad))
    twice = {name for name, times in Counter(name for group in groups for name in group).items() if times > 1}
    if twice:
        raise InputError(f"{sorted(twice)[:3]} are trained by two optimizers. Give every parameter to one of them.")
    if not any(groups):
        raise InputError("the optimizer trains nothing: no group has a parameter that requires a gradient.")
    return tuple(groups)
