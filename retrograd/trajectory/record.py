"""Record a training run with the library's own loop, and open a run folder."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.directions import Direction
from retrograd.errors import IncompleteRecord, InputError, ModelChanged, NonFinite
from retrograd.game import AnyGame, is_game, players_of, turns_of
from retrograd.progress import track
from retrograd.task import AnyTask
from retrograd.trajectory.counterfactual import Counterfactual, Removal, Seeds
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.recorder import Recorder
from retrograd.trajectory.refusals import check_same_run
from retrograd.trajectory.schedule import Schedule, Sqrt
from retrograd.trajectory.state import StepRecord
from retrograd.trajectory.step_gradient import ONE, direction_of
from retrograd.trajectory.store import RunFolder
from retrograd.trajectory.trajectory import Trajectory, to_device
from retrograd.trajectory.update_map import UpdateMap
from retrograd.update_rules import UpdateRule, rule_named

OptimizerOf = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


def batch_order(examples: Examples, epochs: int, batch_size: int, seed: int) -> list[Tensor]:
    """Shuffle the ids anew for each epoch and cut them to batches; the last batch of an epoch may be smaller.

    >>> [len(ids) for ids in batch_order(Examples(torch.zeros(5)), epochs=2, batch_size=2, seed=0)]
    [2, 2, 1, 2, 2, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in range(epochs):
        order += examples.ids[torch.randperm(len(examples), generator=generator)].split(batch_size)
    return order


def record(
    model: nn.Module,
    dataset: Any,
    task: AnyTask | AnyGame,
    *,
    optimizer: OptimizerOf,
    epochs: int | None = None,
    batch_size: int | None = None,
    order: Tensor | Sequence[Tensor] | None = None,
    learning_rates: Sequence[float] | Tensor | None = None,
    clip_norm: float | None = None,
    direction: Direction | None = None,
    weights: Float[Tensor, " example"] | None = None,
    meta: nn.Module | None = None,
    seed: int = 0,
    checkpoints: Schedule | None = None,
    folder: str | PathLike[str] | None = None,
    resume: bool = False,
    keep: float = 1.0,
    removal: Removal = "zero_weight",
    seeds: Seeds = "same",
) -> Trajectory:
    """Train ``model`` in place and record the run.

    Args:
        model: the module to train, as initialised by the caller.
        dataset: training examples: tensors with one row an example, a ``TensorDataset``, a map-style data set, or
            `Examples`.
        task: per-example losses and measurements; or a game, whose players are parts of ``model``.
        optimizer: a ``torch.optim`` optimizer over the model's parameters, or a function that makes one from them (in a game
            from one parameter group for each player).
        epochs: how often to go through the data, shuffled with ``seed``; together with ``batch_size``. In a game with turns
            each batch is used for every turn, one after the other.
        batch_size: examples in a batch.
        order: instead, the ids of each step's batch: ``[T, B]`` or a list of T vectors.
        learning_rates: learning rate of each step, for every group; the optimizer's own if not given.
        clip_norm: clip the global norm of the gradient to this.
        direction: what takes the gradient's place, as extragradient does (see `retrograd.directions`).
        weights: weight of each example in the order of its row, shape ``[N]``; ones if not given.
        meta: a meta-module that the task's losses take as one argument more (see `retrograd.task.Meta`).
        seed: seed of the order and of the random numbers inside the steps.
        checkpoints: which states are kept; about √T if not given.
        folder: where to write the run; None keeps it in memory.
        resume: continue a killed recording in ``folder``; the result has the same bits as one that was never killed.
        keep: record the run at which to linearise for random subsets of this share (see `Counterfactual`).
        removal: how examples leave in that counterfactual.
        seeds: whether retraining in that counterfactual has the same seeds.

    Returns:
        The recorded run. The model holds the trained parameters.

    Raises:
        InputError: the arguments contradict each other.
        NonFinite: the loss became NaN or infinite.

    >>> from retrograd.task import Regression
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = (torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=50, batch_size=2)
    >>> len(run), round(model.weight.item(), 4)
    (50, 2.0)
    """
    examples = Examples.of(dataset)
    steps = _steps(examples, epochs, batch_size, order, seed, turns_of(task) if is_game(task) else ())
    made = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(_groups_of(model, task))
    if direction_of(made) is not None:
        raise InputError(
            f"record evaluates gradients itself, so {type(made).__name__} cannot. Give direction={direction_of(made)} and the "
            "optimizer inside, or record your own loop with Recorder."
        )
    if learning_rates is not None and len(learning_rates) != len(steps):
        raise InputError(f"learning_rates needs one number a step: {len(steps)} steps, {len(learning_rates)} numbers.")
    if weights is not None and weights.shape != (len(examples),):
        raise InputError(f"weights must have one entry an example, shape ({len(examples)},), got {tuple(weights.shape)}.")
    counterfactual = Counterfactual(keep, removal, seeds)
    rate_scale, weight_scale = counterfactual.matched_inputs()
    if weight_scale != 1.0:
        weights = torch.full((len(examples),), weight_scale, dtype=torch.float64) * (1 if weights is None else weights.double())
    model.train()
    recorder = Recorder(
        model,
        examples,
        task,
        made,
        clip_norm=clip_norm,
        checkpoints=checkpoints,
        folder=folder,
        resume=resume,
        seed=seed,
        counterfactual=counterfactual,
        meta=meta,
        direction=direction,
    )
    own_rates = [group["lr"] for group in made.param_groups]
    in_groups = {id(leaf) for group in made.param_groups for leaf in group["params"]}
    trained = [leaf for leaf in model.parameters() if id(leaf) in in_groups]
    device = trained[0].device
    try:
        _check_continued(recorder.records, steps)
        for number in track(range(recorder.steps_done, len(steps)), "training"):
            ids = steps[number]
            batch = to_device(examples.batch(ids), device)
            step_weights = None if weights is None else weights[examples.rows(ids)]
            for group, own in zip(made.param_groups, own_rates, strict=True):
                group["lr"] = rate_scale * (own if learning_rates is None else float(learning_rates[number]))
            with recorder.step(ids, step_weights) as step:
                made.zero_grad()
                on_device = None if step_weights is None else step_weights.to(device)
                if recorder.update_map.gradient.plain:
                    loss = recorder.update_map.step_losses(model, batch, on_device, len(ids), number)[ONE]
                    loss.backward()
                else:
                    loss = recorder.set_gradients(ids, on_device, batch, step.seed)
                step.loss = loss.item()
                if not math.isfinite(step.loss):
                    raise NonFinite(f"the loss of step {number} is {step.loss}. Lower the learning rate or set clip_norm=.")
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, clip_norm)
                made.step()
        return recorder.finish()
    finally:
        recorder.close()
        for group, own in zip(made.param_groups, own_rates, strict=True):
            group["lr"] = own


def open_run(
    folder: str | PathLike[str],
    model: nn.Module,
    dataset: Any,
    task: AnyTask | AnyGame,
    *,
    rule: UpdateRule | None = None,
    direction: Direction | None = None,
    meta: nn.Module | None = None,
    checkpoints: Schedule | None = None,
) -> Trajectory:
    """Open a recorded run.

    A run folder holds data, never code: model, data set and task are given again, and compared with the record.

    Args:
        folder: the run folder.
        model: a module of the same structure as the one recorded; its trained parameters may have any values.
        dataset: the same examples.
        task: the same task.
        rule: the update rule, if it is not one of the library's own.
        direction: what took the gradient's place, if anything did.
        meta: the meta-module, if there was one; its parameters may have any values, those of the record are used.
        checkpoints: how many states a replay may hold; no bound if not given.

    Raises:
        NotRecorded: there is no run in the folder.
        IncompleteRecord: the recording was killed.
        CorruptRecord: a file is torn or altered.
        ModelChanged: model, task or optimizer are not those of the record.
        DataChanged: the data set is not that of the record.
    """
    store = RunFolder(folder)
    manifest = store.manifest()
    if manifest["status"] != "complete":
        raise IncompleteRecord(
            f"the recording in {folder} was killed; its last stored state is that of step {store.steps()[-1]}. Continue it: "
            "call record(...) or Recorder(...) again with resume=True."
        )
    update_map = UpdateMap(
        model,
        task,
        rule or rule_named(manifest["rule"]["class"], manifest["rule"]["options"]),
        manifest["groups"],
        manifest["clip_norm"],
        manifest["model"]["evaluation_modules"],
        meta,
        direction,
    )
    if meta is not None:
        update_map = update_map.with_meta(store.load_meta())
    unknown = {name for group in update_map.groups for name in group} - dict(model.named_parameters()).keys()
    if unknown:
        raise ModelChanged(f"the model has no parameters named {sorted(unknown)[:3]}, which were trained in the recorded run.")
    examples = Examples.of(dataset)
    check_same_run(manifest, update_map, examples)
    records = store.read_steps(manifest["genesis"])
    store.expect(0, manifest["initial"])
    store.check_complete(manifest, records)
    return Trajectory(
        update_map,
        examples,
        records,
        store,
        checkpoints or Sqrt(),
        tolerance=manifest["tolerance"],
        counterfactual=Counterfactual(*manifest["counterfactual"]),
    )


def _check_continued(records: Sequence[StepRecord], steps: list[Tensor]) -> None:
    """Compare the steps of a resumed run with those that are asked for now."""
    if len(records) > len(steps):
        raise InputError(f"the run in the folder already has {len(records)} steps; {len(steps)} are asked for.")
    for number, (record, ids) in enumerate(zip(records, steps, strict=False)):
        if not torch.equal(record.example_ids, ids):
            raise InputError(
                f"the run in the folder made step {number} with another batch. To continue a run, give the same epochs, "
                "batch_size, order and seed."
            )


def _groups_of(model: nn.Module, task: AnyTask | AnyGame) -> Any:
    if not is_game(task):
        return model.parameters()
    leaves = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    return [{"params": [leaves[name] for name in names]} for names in players_of(task, [*leaves]).values()]


def _steps(
    examples: Examples,
    epochs: int | None,
    batch_size: int | None,
    order: Tensor | Sequence[Tensor] | None,
    seed: int,
    turns: Sequence[object],
) -> list[Tensor]:
    if order is not None:
        if epochs is not None or batch_size is not None:
            raise InputError("give either order, or epochs and batch_size, not both.")
        return [torch.as_tensor(ids, dtype=torch.int64) for ids in order]
    if epochs is None or batch_size is None:
        raise InputError("record needs epochs and batch_size, or the order of the batches: order=[T, B].")
    if epochs < 1 or batch_size < 1:
        raise InputError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    return [ids for ids in batch_order(examples, epochs, batch_size, seed) for _ in turns or [None]]
