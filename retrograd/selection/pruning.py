"""Pruning: keep a share of the training data, and find out by retraining what that costs.

    values[i] → the round(f N) examples with the highest values stay, the others are deleted          f = keep

| by | value of example i | stays first |
|---|---|---|
| ``"el2n"`` | mean over early checkpoints of ‖softmax(s(x_i)) − onehot(y_i)‖₂ (Paul et al. 2021) | hard examples |
| ``"self_influence"`` | −∂ℓ_i / ∂w_i, by `TracIn` if no other method is given | what only itself could teach |
| ``"outcome"`` | −w_i ∂(mean loss on ``outcome``) / ∂w_i, exact if no other method is given | what lowers that loss most |
| ``"random"`` | a random number | any |
| ``"stratified"`` | 1 − (r + ½) / n_y, with r the place among the n_y of its label, shuffled | the same share of each label |
| a tensor | what it says | its highest |

EL2N has no unit and lies between 0 and √2; the other scores are in units of the loss per unit of example weight. The stratified
values are those of Sainte-Laguë's apportionment of seats, so any ``keep`` takes shares that are as equal as they can be, and a
smaller one takes a part of what a larger one takes.

Where ``outcome`` is given, the *predicted* effect is −Σ w_i ∂(mean loss) / ∂w_i over the removed examples, w_i their recorded
weights: first order at the run, so it is about small removals, and of large ones it tells the sign at best.

**The baseline.** Random pruning with distillation (`retrograd.selection.distillation`) is as good as clever pruning with
distillation at small f, and far better than clever pruning without (Ben-Baruch et al. 2025). So a claim for a ranking is worth
nothing before it beats that, and ``verify=`` always retrains these controls beside the selected subset: random and stratified
ones, each subset with and without distillation. Hard examples alone are worse than random ones where little is kept.

Assumes, for EL2N, the stratified ranking and verifying, a classification. Cost: EL2N 3 passes over the data and a replay up to
a fifth of the run; self-influence N² inner products a checkpoint; outcome that of one query. Verifying takes 4 (1 + ``draws``)
trainings a seed, many at once.

References: Paul, Ganguli, Dziugaite (2021), "Deep learning on a data diet", section 2; Ben-Baruch et al. (2025), "Distilling
the knowledge in data pruning"; Pruthi et al. (2020), "Estimating training data influence by tracing gradient descent".
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.adjoint import Adjoint, Queries, TracIn
from retrograd.attribution import self_influence
from retrograd.errors import InputError
from retrograd.evaluation import retrain
from retrograd.evaluation.course import Hold
from retrograd.selection.distillation import asking_for_losses, inputs_and_labels, outputs, suggested_weight, with_teacher
from retrograd.selection.effects import effect, refuse_shared
from retrograd.selection.effects import slopes as slopes_of
from retrograd.selection.selection import Effect, Selection
from retrograd.trajectory import Trajectory

Ranking = Literal["el2n", "self_influence", "outcome", "random", "stratified"]

_EARLY = (0.05, 0.1, 0.2)  # shares of the run after which EL2N is taken; the paper's is 0.05 to 0.1 for hundreds of epochs
_HARD = ("el2n", "self_influence")  # rankings that know hard from easy
_RANKINGS = ("el2n", "self_influence", "outcome", "random", "stratified")


def prune(
    run: Trajectory | Sequence[Trajectory],
    keep: float = 0.7,
    *,
    by: Ranking | Tensor = "el2n",
    outcome: Any = None,
    easy: bool = False,
    method: Adjoint | None = None,
    seed: int = 0,
    verify: Any = None,
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
    weight: float | None = None,
    temperature: float = 4.0,
    teacher: Trajectory | None = None,
    hold: Hold = "steps",
    draws: int = 3,
    repeats: int = 4,
    together: int | None = None,
) -> Selection:
    """Choose the examples to keep; on request retrain on them, next to the controls that any choice has to beat.

    Args:
        run: a recorded run, or several of the same examples whose rankings are averaged; the first is what is retrained.
        keep: share of the examples that stays, 0 < keep <= 1.
        by: what they are ranked by (see above), or a value for each example in the order of ``run.examples.ids``.
        outcome: validation data whose mean loss the kept examples should lower; needed by ``"outcome"``, and with any other
            ranking it gives the predicted effect.
        easy: keep easy examples first instead of hard ones (EL2N and self-influence).
        method: how self-influence and outcome scores are obtained, if not as said above.
        seed: of random rankings, of the controls and of the resampling.
        verify: validation data for retraining, ``(inputs, labels)``. Not those of ``outcome``, which were chosen for.
        seeds: fresh seeds to verify with; the recorded one if not given.
        initialise: makes a model for a fresh seed.
        weight: the teacher's share of the loss in distillation; `suggested_weight` if not given.
        temperature: of the distillation.
        teacher: the run that teaches; ``run`` itself, which saw all data, if not given.
        hold: retrain for as many ``"steps"`` or as many ``"epochs"``.
        draws: random and stratified subsets to retrain on.
        repeats: with recorded seeds, orders of the batches to retrain with; they count as seeds.
        together: how many models are trained at once; measured if not given.

    Returns:
        The selection. Its ``verified`` has the effect on the mean loss over ``verify`` (below 0 is better) of ``"selected"``,
        ``"random"``, ``"stratified"`` and ``"everything"``, and of each with ``" + distillation"``, all against training on
        everything with the same seeds and validation examples.

    Raises:
        InputError: an argument is not what is allowed.

    >>> from retrograd.task import Classification
    >>> from retrograd.trajectory import record
    >>> data = (torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1, 1]))
    >>> run = record(nn.Linear(1, 2), data, Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    ...              epochs=5, batch_size=2)
    >>> prune(run, 0.5, by="stratified").kept_ids // 2                      # one of each label
    tensor([0, 1])
    """
    runs = [run] if isinstance(run, Trajectory) else list(run)
    _check(runs, keep, by, outcome, verify, easy)
    if draws < 1 or repeats < 1:
        raise InputError(f"draws and repeats must be at least 1, got {draws} and {repeats}.")
    first = runs[0]
    slopes = None if outcome is None else torch.stack([slopes_of(one, outcome, method=method) for one in runs]).mean(0)
    values = _values(runs, by, slopes, method, seed) * (-1 if easy else 1)
    kept = highest(values, keep)
    predicted = None if slopes is None else -slopes[~kept].sum().item()
    name = "given values" if isinstance(by, Tensor) else by + (f", {'easy' if easy else 'hard'} first" if by in _HARD else "")
    found = Selection(first.examples.ids, values, kept.double(), f"pruning to {keep:.4g} by {name}", predicted)
    if verify is None:
        return found
    weight = suggested_weight(keep) if weight is None else weight
    student = asking_for_losses(with_teacher(first, teacher, weight=weight, temperature=temperature))
    options = {"hold": hold, "seeds": seeds, "initialise": initialise, "seed": seed, "together": together}
    # With recorded seeds a deletion still has an order of the batches, which is luck; see `retrograd.selection.effects`.
    times = repeats if seeds is None else 1
    return replace(found, verified=_verified(first, student, verify, _subsets(first, kept, keep, draws, seed), times, options))


def el2n(run: Trajectory, steps: Sequence[int] | None = None) -> Float[Tensor, " example"]:
    """Return how far each example's predicted probabilities are from its label, ‖softmax − onehot‖₂, early in training.

    Args:
        run: a recorded run of a classification.
        steps: the states to average over; those after 5, 10 and 20 % of the run if not given.

    Returns:
        One number for each example, 0 to √2.

    Raises:
        InputError: the data are not ``(inputs, labels)``.
    """
    inputs, labels = inputs_and_labels(run)
    chosen = sorted({round(share * len(run)) for share in _EARLY}) if steps is None else steps
    norms = []
    for step in chosen:
        probabilities = outputs(run, run.state(step), inputs).softmax(-1)
        norms.append((probabilities - F.one_hot(labels.cpu(), probabilities.shape[-1])).norm(dim=-1))
    return torch.stack(norms).mean(0)


def random_values(run: Trajectory, seed: int) -> Float[Tensor, " example"]:
    """Return a random number for each example: the ranking of random pruning."""
    return torch.rand(len(run.examples), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stratified_values(run: Trajectory, seed: int) -> Float[Tensor, " example"]:
    """Return values whose highest are an equal share of each label's examples, at random within it."""
    labels, values = inputs_and_labels(run)[1].cpu(), torch.empty(len(run.examples), dtype=torch.float64)
    shuffled = random_values(run, seed)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        places = torch.arange(len(rows), dtype=torch.float64)
        values[rows[shuffled[rows].argsort()]] = 1 - (places + 0.5) / len(rows)
    return values


def highest(values: Tensor, keep: float) -> Tensor:
    """Return True for the share ``keep`` with the highest values."""
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.argsort(descending=True, stable=True)[: round(keep * len(values))]] = True
    return kept


def _values(runs: Sequence[Trajectory], by: str | Tensor, slopes: Tensor | None, method: Adjoint | None, seed: int) -> Tensor:
    if isinstance(by, Tensor):
        return by.detach().cpu().double()
    if by == "outcome" and slopes is not None:
        return -slopes
    if by == "el2n":
        return torch.stack([el2n(run) for run in runs]).mean(0).double()
    if by == "self_influence":
        return -torch.stack([self_influence(run, method=method or TracIn()) for run in runs]).mean(0).double()
    return (random_values if by == "random" else stratified_values)(runs[0], seed)


def _subsets(run: Trajectory, kept: Tensor, keep: float, draws: int, seed: int) -> dict[str, Tensor]:
    """The selected subset and the controls, ``[draw, example]`` each."""
    own = range(seed + 1, seed + 1 + draws)  # `seed` itself is a random selection's
    return {
        "everything": torch.ones(1, len(kept), dtype=torch.bool),
        "selected": kept[None],
        "random": torch.stack([highest(random_values(run, one), keep) for one in own]),
        "stratified": torch.stack([highest(stratified_values(run, one), keep) for one in own]),
    }


def _verified(
    run: Trajectory, student: Trajectory, data: Any, subsets: dict[str, Tensor], times: int, options: dict[str, Any]
) -> dict[str, Effect]:
    factors = torch.cat(list(subsets.values())).repeat_interleave(times, 0)
    outcomes: dict[str, Tensor] = {}
    for suffix, trained, of in (("", run, "losses"), (" + distillation", student, "measurements")):
        found = retrain(trained, Queries(data, of=of), factors, removal="deletion", **options)
        values = found.values.unflatten(0, (-1, times)).flatten(1, 2)  # draw, seed, query
        parts = values.split([len(rows) for rows in subsets.values()])
        outcomes |= {name + suffix: part for name, part in zip(subsets, parts, strict=True)}
    everything = outcomes["everything"][0]
    return {name: effect(everything, values, seed=options["seed"]) for name, values in outcomes.items()}


def _check(runs: list[Trajectory], keep: float, by: str | Tensor, outcome: Any, verify: Any, easy: bool) -> None:
    if not runs:
        raise InputError("there is no run to prune the data of.")
    ids, total = runs[0].examples.ids, len(runs[0].examples)
    if any(not torch.equal(run.examples.ids, ids) for run in runs):
        raise InputError("runs whose rankings are averaged must have the same examples, in the same order of ids.")
    if not 0 < keep <= 1 or not round(keep * total):
        raise InputError(f"keep is the share of the {total} examples that stays, at least one of them, got {keep}.")
    if isinstance(by, Tensor):
        if by.shape != (total,) or not by.double().isfinite().all():
            raise InputError(f"by needs one finite value an example, shape ({total},), got shape {tuple(by.shape)}.")
    elif by not in _RANKINGS:
        raise InputError(f"by must be one of {', '.join(_RANKINGS)}, or a tensor of values, got {by!r}.")
    if isinstance(by, str) and by == "outcome":
        if outcome is None:
            raise InputError("by='outcome' needs to know which: give validation data, outcome=(inputs, labels).")
        if verify is not None:
            refuse_shared(outcome, verify)
    if easy and (isinstance(by, Tensor) or by not in _HARD):
        raise InputError("easy= turns around a ranking by difficulty, 'el2n' or 'self_influence'; negate values of your own.")
