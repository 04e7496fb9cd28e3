"""Attribution: a method walks the run, and the parts it yields are added up to scores.

scores[q, i] = d measurement_q / d w_i
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from retrograd.adjoint import Adjoint, Blend, Engine, Notes, Queries, ScorePart, Unrolled
from retrograd.adjoint.blend import needs_smoothness
from retrograd.adjoint.contraction import MEMORY
from retrograd.adjoint.part_files import begin, read_part, write_part
from retrograd.attribution.blending import blended
from retrograd.attribution.choosing import Choice, choose
from retrograd.attribution.coverage import coverage
from retrograd.attribution.memory import peak_memory
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
    method: Adjoint | Literal["auto"] | None = None,
    budget: float | None = None,
    keep: float | None = None,
    removal: Removal = "zero_weight",
    seeds: Seeds = "same",
    memory: int = MEMORY,
    query_batch: int | None = None,
    rank: int | None = None,
    tokens: bool = False,
    folder: str | os.PathLike[str] | None = None,
    check_roughness: bool | None = None,
) -> Scores:
    """Score all training examples for each query: which made the model do this, and by how much.

    Args:
        run: a recorded run, or several (other seeds): their scores are averaged. A `Blend` without shares then finds them by
            how the runs agree (`shares_by_agreement`).
        queries: what is asked about, anything that `Examples` takes; each gets the task's measurement.
        method: how costates are obtained; exact unrolling if not given; ``"auto"`` takes what promises most for the budget, and
            says why in the notes.
        budget: for ``"auto"``, processor time in epochs of the run's own training (of each run's, if there are several).
        keep: the counterfactual whose outcome the scores are to predict: the share of the training examples that stays. 1
            for small removals, which is right at the run itself; below 1 the run is trained again at matched training time
            and linearised there. If not given, what the run was recorded for: 1, if nothing was said.
        removal: how examples leave, by ``"zero_weight"`` or by ``"deletion"`` from the data set (see `Counterfactual`).
        seeds: whether the retraining in question has the ``"same"`` seeds as the run or ``"fresh"`` ones.
        memory: bytes that costates and gradients may take, beside the model's own activations. It decides how many queries and
            how many examples are taken together, and the result does not depend on it.
        query_batch: how many queries are carried at once; what half of ``memory`` holds if not given.
        rank: carry so many directions of the queries' vectors in place of all of them; the share of their energy that is lost
            is in the notes.
        tokens: split each score over the positions of the example (``Scores.tokens``), for approximate methods and tasks with
            ``token_losses``.
        folder: where finished parts are kept. A killed call with the same arguments goes on there after the last whole part;
            only fits of curvatures are made again.
        check_roughness: measure, by three more trainings, whether derivatives of this run can be trusted, and warn if not. If
            not given, only for methods that take exact derivatives of the steps.

    Returns:
        Scores ``[query, example]`` with the ids of both.

    Raises:
        InputError: an argument is not what is allowed.
        RecordExists: the folder holds parts of another call.
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
        given: dict[str, Any] = {"keep": keep, "removal": removal, "seeds": seeds, "memory": memory, "rank": rank}
        given |= {"query_batch": query_batch, "tokens": tokens, "check_roughness": check_roughness, "budget": budget}
        return _ensemble(run, queries, method, None if folder is None else Path(folder), given)
    began = time.process_time()
    asked = queries if isinstance(queries, Queries) else Queries(queries)
    counterfactual = _asked_for(run, keep, removal, seeds)
    choice = _chosen(run, asked, method, budget, counterfactual)
    method = Unrolled() if method is None else method if choice is None else choice.method
    assert not isinstance(method, str)
    covered = coverage(run, method)
    _logger.info("%s", covered)
    point = run.matching(counterfactual)
    notes = Notes({"parameters_covered": covered.trained, "parameters_frozen": covered.frozen, "coverage": str(covered)})
    check_roughness = needs_smoothness(method) if check_roughness is None else check_roughness
    if choice is not None:
        notes.add(why=choice.why, more=choice.more, expected_epochs=choice.epochs)
    if check_roughness and isinstance(point, Trajectory) and len(point):
        found = roughness(point)
        notes.add(metasmoothness=found.metasmoothness, amplification=found.amplification)
        warn_if_rough(found)
    engine = Engine(memory, rank, tokens, notes=notes)
    query_batch = engine.query_batch(point) if query_batch is None else query_batch
    notes.add(memory=memory, query_batch=min(query_batch, len(asked)))
    if folder is not None:
        if tokens:
            raise InputError("scores by token are not kept in part files; leave out tokens or folder.")
        plan = {"query_batch": query_batch, "memory": memory, "rank": rank, "method": repr(method), "run": point.digest}
        engine.folder = begin(Path(folder), plan | {"queries": asked.examples.root(), "of": asked.of, "mean": asked.mean})
    parts = asked.slices(query_batch)
    engine.reuse = len(parts) > 1
    slices = [_summed(method, point, own, engine.under(f"{number:04d}")) for number, own in enumerate(parts)]
    values = torch.cat([own.values for own in slices])
    by_token = torch.cat([own.tokens for own in slices if own.tokens is not None]) if tokens else None
    if isinstance(point, Trajectory):
        notes.add(replay_drift=point.drift)
    notes.add(seconds=time.process_time() - began, peak_memory=peak_memory(values.device))
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
        tokens=by_token,
    )


def _asked_for(run: Run, keep: float | None, removal: Removal, seeds: Seeds) -> Counterfactual:
    """The counterfactual that is meant; a run that was recorded for one answers for that, if nothing is said."""
    if keep is None and run.counterfactual.keep != 1.0:
        return run.counterfactual
    return Counterfactual(1.0 if keep is None else keep, removal, seeds)


def _chosen(
    run: Run, asked: Queries, method: Adjoint | str | None, budget: float | None, counterfactual: Counterfactual
) -> Choice | None:
    if (method == "auto") != (budget is not None):
        raise InputError(
            'method="auto" needs a budget in epochs of the run\'s training, as budget=50; any other method takes no budget.'
        )
    return None if budget is None else choose(run, asked, budget, counterfactual)


def _ensemble(runs: Sequence[Run], queries: Any, method: Adjoint | Any, folder: Path | None, given: dict[str, Any]) -> Scores:
    """Average over runs; a blend without shares finds them by how the runs agree."""
    if not runs:
        raise InputError("there is no run to attribute.")
    if method == "auto":  # once for all runs: clocks differ
        asked = queries if isinstance(queries, Queries) else Queries(queries)
        counterfactual = _asked_for(runs[0], given["keep"], given["removal"], given["seeds"])
        choice = _chosen(runs[0], asked, method, given["budget"], counterfactual)
        assert choice is not None
        scores = _ensemble(runs, asked, choice.method, folder, given | {"budget": None})
        return replace(scores, notes={**scores.notes, "why": choice.why, "more": choice.more})
    folders = [None if folder is None else folder / f"run-{number}" for number in range(len(runs))]
    if not isinstance(method, Blend) or method.shares is not None or len(runs) < 2:
        each = zip(runs, folders, strict=True)
        return Scores.mean([attribute(run, queries, method=method, folder=own, **given) for run, own in each])
    found: list[list[Scores]] = [[] for _ in method.methods]
    for run, own in zip(runs, folders, strict=True):
        for number, one in enumerate(method.methods):
            place = None if own is None else own / f"method-{number}"
            found[number].append(attribute(run, queries, method=one, folder=place, **given))
    return blended(found, repr(method))


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
    found, engine = [], Engine()
    for some in ids.split(query_batch):
        asked = Queries(Examples(run.examples.batch(some), some), of="losses")
        values = _summed(method, run, asked, engine.under(str(int(some[0])))).values
        found.append(values[torch.arange(len(some)), run.examples.rows(some)])
    if not found:
        raise UnknownExample("example_ids is empty.")
    return torch.cat(found)


def _summed(method: Adjoint, run: Run, queries: Queries, engine: Engine) -> ScorePart:
    """Add up all parts; a finished sum is kept in the engine's folder."""
    file = None if engine.folder is None else engine.folder / f"{engine.prefix}.parquet"
    if file is not None and (found := read_part(file, run.examples.ids, engine.notes)) is not None:
        return found
    values, tokens = None, None
    for part in method.parts(run, queries, engine):
        if engine.tokens and part.tokens is None:  # at the first part: nothing long was computed in vain
            raise InputError(f"{method!r} gives no scores by token; use Source, Implicit or TracIn.")
        rows, own = run.examples.rows(part.example_ids), part.values.cpu()
        if values is None:
            values = own.new_zeros(len(queries), len(run.examples))
        values.index_add_(1, rows, own)
        if part.tokens is not None:
            if tokens is None:
                tokens = own.new_zeros(*values.shape, part.tokens.shape[2])
            if tokens.shape[2] != part.tokens.shape[2]:
                raise InputError(
                    f"scores by token need examples of one length; got {tokens.shape[2]} and {part.tokens.shape[2]} positions. "
                    "Pad them to one length."
                )
            tokens.index_add_(1, rows, part.tokens.cpu())
    values = torch.zeros(len(queries), len(run.examples)) if values is None else values
    whole = ScorePart(run.examples.ids, values, tokens)
    if file is not None:
        write_part(file, whole, engine.notes)
    return whole
