"""Attribution: a method walks the run, and the parts it yields are added up to scores.

scores[q, i] = d measurement_q / d w_i
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrograd.adjoint import Adjoint, Notes, Queries, Unrolled
from retrograd.attribution.coverage import coverage
from retrograd.attribution.scores import Scores
from retrograd.errors import InputError, UnknownExample
from retrograd.trajectory import Counterfactual, Examples, Run, Trajectory, roughness
from retrograd.trajectory.counterfactual import Removal, Seeds
from retrograd.trajectory.roughness import warn_if_rough

_logger = logging.getLogger("retrograd")


def attribute(
    run: Run | Sequence[Run],
    queries: Any,
    *,
    method: Adjoint | None = None,
    keep: float | None = None,
    removal: Removal = "zero_weight",
    seeds: Seeds = "same",
    query_batch: int | None = None,
    check_roughness: bool = True,
) -> Scores:
    """Score all training examples for each query: which made the model do this, and by how much.

    Args:
        run: a recorded run, or several (other seeds): their scores are averaged.
        queries: what is asked about, anything that `Examples` takes; each gets the task's measurement.
        method: how costates are obtained; exact unrolling if not given.
        keep: the counterfactual whose outcome the scores are to predict: the share of the training examples that stays. 1
            for small removals, which is right at the run itself; below 1 the run is trained again at matched training time
            and linearised there. If not given, what the run was recorded for: 1, if nothing was said.
        removal: how examples leave, by ``"zero_weight"`` or by ``"deletion"`` from the data set (see `Counterfactual`).
        seeds: whether the retraining in question has the ``"same"`` seeds as the run or ``"fresh"`` ones.
        query_batch: how many queries are carried at once, to bound memory; the result does not depend on it.
        check_roughness: measure, by three more trainings, whether derivatives of this run can be trusted; warn if not.

    Returns:
        Scores ``[query, example]`` with the ids of both.

    Raises:
        InputError: an argument is not what is allowed.
        NotRecorded: the method needs more than the run holds.
        NoSecondDerivative: the model has a kernel that can be differentiated only once.

    >>> from torch import nn
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> data = (torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> run = record(model, data, Regression("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.25),
    ...              order=torch.tensor([[0, 1]]))
    >>> attribute(run, (torch.tensor([[1.0]]), torch.tensor([[0.0]])), check_roughness=False).values   # θ₁ = Σ w_i y_i / 4
    tensor([[0.2500, 0.7500]])
    """
    if isinstance(run, Sequence):
        if not run:
            raise InputError("there is no run to attribute.")
        shared: dict[str, Any] = {"keep": keep, "removal": removal, "seeds": seeds, "query_batch": query_batch}
        return Scores.mean([attribute(one, queries, method=method, check_roughness=check_roughness, **shared) for one in run])
    began = time.process_time()
    method = method or Unrolled()
    asked = queries if isinstance(queries, Queries) else Queries(queries)
    matched = keep is None and run.counterfactual.keep != 1.0
    counterfactual = run.counterfactual if matched else Counterfactual(1.0 if keep is None else keep, removal, seeds)
    covered = coverage(run)
    _logger.info("%s", covered)
    point = run.matching(counterfactual)
    notes = Notes({"parameters_covered": covered.trained, "parameters_frozen": covered.frozen, "coverage": str(covered)})
    if check_roughness and isinstance(point, Trajectory) and len(point):
        found = roughness(point)
        notes.add(metasmoothness=found.metasmoothness, amplification=found.amplification)
        warn_if_rough(found)
    values = torch.cat([_sum_parts(method, point, part, notes) for part in asked.slices(query_batch)])
    if isinstance(point, Trajectory):
        notes.add(replay_drift=point.drift)
    notes.add(seconds=time.process_time() - began)
    return Scores(
        values,
        run.examples.ids,
        asked.ids,
        repr(method),
        method.unit,
        run.digest,
        counterfactual,
        dict(notes.entries),
        asked,
    )


def self_influence(
    run: Run,
    *,
    method: Adjoint | None = None,
    example_ids: Sequence[int] | Tensor | None = None,
    query_batch: int = 256,
) -> Tensor:
    """Score each training example for its own final loss: d ℓ_i(θ_T) / d w_i, usually negative.

    Very negative: the model needed this very example to fit it. So the ranking finds mislabelled and atypical examples.

    Args:
        run: a recorded run.
        method: how costates are obtained; exact unrolling if not given.
        example_ids: which examples; all if not given.
        query_batch: how many are carried at once.

    Returns:
        One score for each example, shape ``[example]``, in units of the loss per unit of example weight.
    """
    method = method or Unrolled()
    ids = run.examples.ids if example_ids is None else torch.as_tensor(example_ids, dtype=torch.int64)
    run.examples.rows(ids)
    found = []
    for some in ids.split(query_batch):
        asked = Queries(Examples(run.examples.batch(some), some), of="losses")
        values = _sum_parts(method, run, asked, Notes())
        found.append(values[torch.arange(len(some)), run.examples.rows(some)])
    if not found:
        raise UnknownExample("example_ids is empty.")
    return torch.cat(found)


def _sum_parts(method: Adjoint, run: Run, queries: Queries, notes: Notes) -> Tensor:
    total = None
    for part in method.parts(run, queries, notes):
        values = part.values.cpu()
        if total is None:
            total = values.new_zeros(len(queries), len(run.examples))
        total.index_add_(1, run.examples.rows(part.example_ids), values)
    return torch.zeros(len(queries), len(run.examples)) if total is None else total
