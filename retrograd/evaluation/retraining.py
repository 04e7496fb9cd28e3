"""Retrain a recorded run with other data: the truth that scores predict.

    run, subsets × seeds  →  measurements[subset, seed, query]

`Course` says what a retraining is, `Program` makes many at once, `Study` keeps them in a folder; here they are put to work, in
this process or in any ``concurrent.futures.Executor``: spawned processes (``workers=``), a Ray cluster
(`retrograd.distributed.RayExecutor`), or the user's own.

Cost: one training each where compute binds; for small models several times less, because they are trained together.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from os import PathLike
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from retrograd.adjoint import Queries
from retrograd.errors import InputError
from retrograd.evaluation.course import Hold, Protocol
from retrograd.evaluation.program import Program, best_together
from retrograd.evaluation.retrained import Retrained, share_kept
from retrograd.evaluation.study import Study
from retrograd.evaluation.work import Work
from retrograd.progress import track_steps
from retrograd.trajectory import All, Counterfactual, MemoryCheckpoints, TrainingState, Trajectory, digests, fresh_start
from retrograd.trajectory.counterfactual import Removal


def retrain(
    run: Trajectory,
    queries: Any,
    factors: Shaped[Tensor, "subset example"],
    *,
    removal: Removal = "zero_weight",
    hold: Hold = "epochs",
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
    together: int | None = None,
    memory: int = 1 << 30,
    workers: int = 1,
    executor: Executor | None = None,
    folder: str | PathLike[str] | None = None,
) -> Retrained:
    """Train again with other example weights or on subsets, and measure the queries.

    Args:
        run: the recorded run.
        queries: what is measured: `Queries`, or anything that `Examples` takes.
        factors: factor on each example's recorded weight, True and False for those that stay and go.
        removal: what a factor of 0 means: ``"zero_weight"`` or ``"deletion"`` (see `retrograd.evaluation.course`).
        hold: of a deletion: make as many ``"epochs"`` or as many ``"steps"``.
        seeds: train each subset once with each of these fresh seeds, which give start, order of the batches and random
            numbers as ``record(initialise(seed), ..., seed=seed)`` does; the recorded ones if not given.
        initialise: makes a model for a fresh seed; called with torch's global generator seeded.
        seed: seed of the shuffles of deletions with the recorded seeds.
        together: how many models are trained at once in one batched program; 1 for one after the other. By memory and by a
            measurement of a few steps if not given.
        memory: bytes that models trained together may take; an estimate.
        workers: processes that share the work, spawned; model and task must then be importable.
        executor: share the work over this executor instead.
        folder: keep finished parts in this folder, continue what is there, and share the work with every other process
            that is called with the same arguments. Without it, a killed study is lost.

    Returns:
        The measurements and what they belong to. A training that became non-finite has NaN, with a warning.

    Raises:
        InputError: an argument is not what is allowed.
        RecordExists: the folder holds another study.

    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> data = (torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> run = record(model, data, Regression("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.25),
    ...              order=torch.tensor([[0, 1]]))
    >>> query = (torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    >>> retrain(run, query, torch.tensor([[True, True], [True, False]])).outcomes           # θ₁ = Σ w_i y_i / 4
    tensor([[1.0000],
            [0.2500]])
    """
    _check(run, factors, removal, seeds, initialise, together, workers)
    asked = queries if isinstance(queries, Queries) else Queries(queries)
    lean = _lean(run)
    starts: dict[int | None, TrainingState] = (
        {None: lean.state(0)}
        if seeds is None or initialise is None
        else {one: fresh_start(lean, initialise, one) for one in seeds}
    )
    protocol = Protocol(lean, removal, hold, seed)
    first = next(iter(starts))

    def measured() -> int:
        each = -(-len(factors) * len(starts) // workers)  # nobody should go idle
        return best_together(protocol, starts[first], factors[:each], first, memory) if together is None else together

    counterfactual = Counterfactual(share_kept(factors), removal, "same" if seeds is None else "fresh")
    study = None if folder is None else Study(folder)
    if study is None:
        size = measured()
    else:
        size = study.begin(
            _asked(protocol, asked, factors, starts, counterfactual),
            measured,
            subsets=len(factors),
            seeds=list(starts),
            example_ids=run.examples.ids.tolist(),
            query_ids=asked.ids.tolist(),
            dtype=str(next(iter(starts[first].params.values())).dtype).removeprefix("torch."),
        )["together"]
    work = Work(Program(protocol, asked, starts, size), factors, study)
    with ExitStack() as stack:
        if executor is None and workers > 1:
            threads = max((os.cpu_count() or 1) // workers, 1)
            executor = stack.enter_context(
                ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))
            )
        for _ in track_steps(work.here() if executor is None else work.elsewhere(executor), work.steps, "retraining"):
            pass
    if study is None:
        values = work.gathered()
        found = Retrained(values, factors, tuple(starts), run.examples.ids, asked.ids, counterfactual, run.digest)
    else:
        found = study.read()
    broken = (~found.values.isfinite()).any(2).sum().item()
    if broken:
        warnings.warn(f"{broken} of {found.values[..., 0].numel()} retrainings became non-finite; they have NaN.", stacklevel=2)
    return found


def _check(
    run: Trajectory,
    factors: Tensor,
    removal: Removal,
    seeds: Sequence[int] | None,
    initialise: Callable[[int], nn.Module] | None,
    together: int | None,
    workers: int,
) -> None:
    if not isinstance(run, Trajectory):
        raise InputError(f"a {type(run).__name__} cannot be trained again: record the training, or open a run folder.")
    if factors.dim() != 2 or factors.shape[1] != len(run.examples) or not len(factors):
        raise InputError(
            f"factors must have one row a retraining and one column an example, shape [subset, {len(run.examples)}], got "
            f"{tuple(factors.shape)}."
        )
    if removal not in ("zero_weight", "deletion"):
        raise InputError(f"removal must be 'zero_weight' or 'deletion', got {removal!r}.")
    if removal == "deletion" and not (factors != 0).any(1).all():
        raise InputError("deletion needs at least one example that stays in each subset.")
    if seeds is not None and (not seeds or len(set(seeds)) != len(seeds)):
        raise InputError(f"seeds must be distinct numbers, at least one, got {list(seeds)}.")
    if (seeds is None) != (initialise is None):
        raise InputError(
            "fresh seeds need to know how a model is made: give both seeds=[...] and initialise=, a function from a seed to a "
            "new model (for fine-tuning, to the pre-trained one). The record holds only the start that was."
        )
    if workers < 1 or (together is not None and together < 1):
        raise InputError(f"workers and together must be at least 1, got {workers} and {together}.")


def _lean(run: Trajectory) -> Trajectory:
    """The run with nothing but its first state: all that a retraining needs, and little to send."""
    checkpoints = MemoryCheckpoints()
    checkpoints.save(run.state(0))
    return Trajectory(run.update_map, run.examples, run.records, checkpoints, All())


def _asked(
    protocol: Protocol, queries: Queries, factors: Tensor, starts: dict[int | None, TrainingState], kept: Counterfactual
) -> dict[str, Any]:
    rows = hashlib.sha256(str(tuple(factors.shape)).encode())
    for row in factors:
        rows.update(row.double().numpy().tobytes())
    return {
        "run": protocol.run.digest,
        "queries": f"{queries.of}/{queries.examples.root()}",
        "subsets": rows.hexdigest(),
        "starts": [digests.state_digest(state) for state in starts.values()],
        "removal": protocol.removal,
        "hold": protocol.hold,
        "keep": kept.keep,
        "seed": protocol.seed,
        "seeds": list(starts),
    }
