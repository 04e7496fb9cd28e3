"""Retrain a recorded run on subsets of its data: the truth that scores predict.

All retrainings of a chunk run as one batched program: parameters, slots and buffers get a leading axis ``subset``, and one
vmapped step advances every model at once. Same start, same batches, same random numbers; an example outside the subset
weighs nothing (or is deleted: see ``removal``).

``removal="zero_weight"`` multiplies the recorded weights, the batch keeps its size B as denominator.
``removal="deletion"`` leaves a shorter run: each subset gets its own batches, cut anew from its own shuffled ids with the
recorded batch size, epochs and learning rates (stretched over the shorter run).

Cost: about one training for all of a chunk where the plain step is bound by overhead, one each where compute binds.
Memory: one state and one batch of activations for each subset of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params
from retrograd.progress import track
from retrograd.trajectory import Examples, StepInputs, TrainingState, Trajectory, batch_order
from retrograd.trajectory.counterfactual import Removal
from retrograd.trajectory.state import map_batch
from retrograd.trajectory.trajectory import to_device


def random_subsets(run: Trajectory, count: int, keep: float, seed: int = 0) -> Bool[Tensor, "subset example"]:
    """Draw subsets of equal size, round(keep · N), uniformly.

    Args:
        run: the run whose examples are drawn from.
        count: how many subsets.
        keep: share of the examples that stays.
        seed: seed of the draw.

    Returns:
        True where an example stays, in the order of ``run.examples.ids``.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of examples that stays, 0 < keep <= 1, got {keep}.")
    generator = torch.Generator().manual_seed(seed)
    total = len(run.examples)
    kept = torch.zeros(count, total, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(total, generator=generator)[: round(keep * total)]] = True
    return kept


def retrain(
    run: Trajectory,
    queries: Any,
    kept: Bool[Tensor, "subset example"],
    *,
    removal: Removal = "zero_weight",
    seed: int = 0,
    chunk: int = 64,
) -> Float[Tensor, "subset query"]:
    """Train again on each subset and return the measurements of the queries.

    Args:
        run: the recorded run.
        queries: what is measured, anything that `Examples` takes.
        kept: True where an example stays, shape ``[subset, example]``.
        removal: ``"zero_weight"`` or ``"deletion"``.
        seed: seed of the batches of shorter runs (deletion only).
        chunk: how many models are trained at once.

    Returns:
        Measurements after each retraining.
    """
    if kept.dim() != 2 or kept.shape[1] != len(run.examples) or kept.dtype != torch.bool:
        raise InputError(
            f"kept must be True or False for each subset and example, shape [subset, {len(run.examples)}], got "
            f"{kept.dtype} {tuple(kept.shape)}."
        )
    asked = Examples.of(queries)
    program = _zero_weight_steps if removal == "zero_weight" else _deletion_steps
    parts = kept.split(chunk)
    batch = to_device(asked.batch(asked.ids), run.device)
    work = [(part, list(program(run, part, seed * 1_000_003 + index * chunk))) for index, part in enumerate(parts)]
    total = [(part, step) for part, steps in work for step in steps]
    results: list[Tensor] = []
    states: TrainingState | None = None
    for part, step in track(total, "retraining"):
        if states is None:
            states = _stacked(run.state(0), len(part))
        inputs, weights = step(run)
        states = run.update_map.many(states, inputs, weights, own_batches=removal == "deletion")
        if states.step == len(work[len(results)][1]):
            results.append(_measure(run, states, batch))
            states = None
    return torch.cat(results)


_Step = Callable[[Trajectory], tuple[StepInputs, Tensor]]


def _zero_weight_steps(run: Trajectory, kept: Tensor, seed: int) -> Iterator[_Step]:
    """The recorded steps, with weight zero for examples outside of the subset."""

    def make(number: int) -> _Step:
        def step(run: Trajectory) -> tuple[StepInputs, Tensor]:
            inputs = run.inputs(number)
            weights = kept[:, run.examples.rows(inputs.example_ids)].double()
            if inputs.weights is not None:
                weights = weights * inputs.weights
            return inputs, weights.to(run.device, next(iter(run.update_map.model.parameters())).dtype)

        return step

    return (make(number) for number in range(len(run)))


def _deletion_steps(run: Trajectory, kept: Tensor, seed: int) -> Iterator[_Step]:
    """Steps of a shorter run: own batches for each subset, recorded hyperparameters stretched over its length."""
    sizes = kept.sum(1)
    if len(sizes.unique()) > 1:
        raise InputError("subsets of one deletion study must have equal size; their runs could not share a program otherwise.")
    batch_size = max(len(record.example_ids) for record in run.records)
    visits = sum(len(record.example_ids) for record in run.records)
    epochs = max(round(visits / len(run.examples)), 1)
    orders = [
        batch_order(Examples(torch.zeros(len(ids)), ids), epochs, batch_size, seed + row)
        for row, ids in enumerate(run.examples.ids[mask] for mask in kept)
    ]
    length, weights = len(orders[0]), _example_weights(run)

    def make(number: int) -> _Step:
        def step(run: Trajectory) -> tuple[StepInputs, Tensor]:
            record = run.records[number * len(run) // length]
            hyper = tuple({**own, "step": number + 1.0} if "step" in own else dict(own) for own in record.hyper)
            if number:  # torch has no dampening in the first step, and that step is recorded so
                hyper = tuple(
                    {**own, "dampening": run.records[-1].hyper[index]["dampening"]} if "dampening" in own else own
                    for index, own in enumerate(hyper)
                )
            ids = torch.stack([order[number] for order in orders])
            flat = to_device(run.examples.batch(ids.flatten()), run.device)
            own_batches = map_batch(lambda leaf: leaf.unflatten(0, ids.shape), flat)
            dtype = next(iter(run.update_map.model.parameters())).dtype
            own_weights = weights[run.examples.rows(ids.flatten())].view_as(ids).to(run.device, dtype)
            return StepInputs(ids[0], None, hyper, own_batches, record.seed), own_weights

        return step

    return (make(number) for number in range(length))


def _example_weights(run: Trajectory) -> Tensor:
    """The recorded weight of each example, which must be the same at each of its visits."""
    weights = torch.full((len(run.examples),), torch.nan, dtype=torch.float64)
    for record in run.records:
        rows = run.examples.rows(record.example_ids)
        own = torch.ones(len(rows), dtype=torch.float64) if record.weights is None else record.weights
        if not ((weights[rows] == own) | weights[rows].isnan()).all():
            raise InputError("deletion needs one weight for each example; in this run weights change from step to step.")
        weights[rows] = own
    return weights.nan_to_num(nan=1.0)


def _stacked(state: TrainingState, count: int) -> TrainingState:
    return state.map(lambda leaf: leaf.expand(count, *leaf.shape).clone())


def _measure(run: Trajectory, states: TrainingState, batch: Any) -> Tensor:
    def measure(params: Params, buffers: Params) -> Tensor:
        return run.update_map.measurements(TrainingState(params, {}, buffers, 0), batch)

    with torch.no_grad():
        return torch.func.vmap(measure)(states.params, states.buffers).cpu()
