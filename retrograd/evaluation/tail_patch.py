"""Tail patch: one more step of training on a query's strongest examples should raise its measurement.

    change_q = f_q(Φ(s_T, top k of q)) − f_q(s_T)

s_T        the final state of the run; Φ one step of its optimizer on a batch of the k examples with the highest scores.

Nothing is retrained, so it can be afforded for models of any size; but it sees only what an example does *once more at the
end*, not what it did during training. Read it beside a retraining check, not in its place. Random examples are the control.

Cost: one step on k examples for each query, twice.

Reference: Chang, Rajagopal, Bolukbasi, Dixon, Tenney (2024), "Scalable influence and fact tracing for large language model
pretraining", section 5.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.adjoint import Queries
from retrograd.attribution import Scores
from retrograd.errors import InputError
from retrograd.evaluation.program import measured, stacked
from retrograd.progress import track
from retrograd.trajectory import StepInputs, TrainingState, Trajectory
from retrograd.trajectory.state import map_batch
from retrograd.trajectory.trajectory import to_device
from retrograd.update_rules import Hyper


@dataclass(frozen=True)
class TailPatch:
    """Change of each query's measurement by one more step.

    Attributes:
        change: by a step on the query's own top examples.
        control: by a step on as many random examples.
    """

    change: Float[Tensor, " query"]
    control: Float[Tensor, " query"]


def tail_patch(
    scores: Scores,
    run: Trajectory,
    k: int = 10,
    *,
    queries: Any = None,
    learning_rate: float | None = None,
    together: int = 64,
    seed: int = 0,
) -> TailPatch:
    """Make one more step of training on each query's ``k`` strongest examples and measure the query.

    Args:
        scores: scores of some method.
        run: the recorded run.
        k: size of the batch.
        queries: what was asked, if the scores came from a file.
        learning_rate: of the step; that of the run's last step if not given (after a decay to 0 give one).
        together: how many queries' steps are made in one batched program.
        seed: of the random examples.

    Raises:
        InputError: k is not between 1 and the number of examples, or the learning rate is 0.
    """
    asked = scores.asked(queries)
    if not 1 <= k <= len(run.examples):
        raise InputError(f"k must be between 1 and the number of examples, {len(run.examples)}, got {k}.")
    last = run.records[-1]
    hyper = tuple(
        {
            **own,
            "learning_rate": own["learning_rate"] if learning_rate is None else learning_rate,
            **({"step": own["step"] + 1} if "step" in own else {}),
        }
        for own in last.hyper
    )
    if not any(own["learning_rate"] for own in hyper):
        raise InputError("the run ended with a learning rate of 0, with which a step changes nothing: give learning_rate=.")
    state = run.final_state
    before = asked.values(run.update_map, state).detach().cpu()
    generator = torch.Generator().manual_seed(seed)
    random = torch.stack([torch.randperm(len(run.examples), generator=generator)[:k] for _ in range(len(asked))])
    changes = []
    for rows in (scores.values.topk(k, dim=1).indices.cpu(), random):
        places = list(torch.arange(len(asked)).split(together))
        parts = [_step(run, asked, state, rows[own], own, hyper, last.seed) for own in track(places, "tail patch")]
        changes.append(torch.cat(parts) - before)
    return TailPatch(*changes)


def _step(
    run: Trajectory,
    asked: Queries,
    state: TrainingState,
    rows: Tensor,
    own: Tensor,
    hyper: tuple[Hyper, ...],
    seed: int,
) -> Tensor:
    """One step on the examples ``rows[query]``, and then the measurement of query ``own[query]``."""
    ids = run.examples.ids[rows]
    batch = map_batch(lambda leaf: leaf.unflatten(0, ids.shape), to_device(run.examples.batch(ids.flatten()), run.device))
    weights = torch.ones(ids.shape, dtype=next(iter(state.params.values())).dtype, device=run.device)
    inputs = StepInputs(ids[0], None, hyper, batch, seed)
    states = run.update_map.many(stacked(state, len(rows)), inputs, weights, own_batches=True)
    return measured(run.update_map, asked, states)[torch.arange(len(own)), own]
