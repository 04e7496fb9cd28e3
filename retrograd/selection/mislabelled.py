"""Find training examples whose label is likely wrong.

Five kinds of suspicion s_i, with ℓ_i the loss of example i, its given label, in evaluation mode:

    "held_out"        mean of ℓ_i(θ_S) over random halves S of the data that leave i out, weights 2 on S and 0 elsewhere
    "loss"            ℓ_i(θ_T), after training
    "training_loss"   mean of ℓ_i(θ_t) over states t along training
    "self_influence"  −d ℓ_i(θ_T) / d w_i, with w_i the weight of example i
    "validation"      d L / d f_i, with f_i a factor on w_i and L the mean loss on validation data that is known to be clean

Why wrong labels show. A network that generalises predicts the label which the other examples imply, and disagrees with a wrong
one, so that its loss is high unless this very example taught it. "loss" fails once it did: a converged model has learnt the
wrong labels by heart. "held_out" takes away the example, "training_loss" looks before it is learnt (right labels are learnt
first), "self_influence" asks how much the example itself was needed, "validation" whether it harms.

Halves come in pairs, one the complement of the other, so that each example is left out of one of both. Weight 2 on what stays
keeps the mean weight 1: the halves train as long as the run did, on its own batches, and so any run will do. With weight 1, or
fewer steps, a half is trained half as much, and what is merely hard looks wrong.

What share of the flips is in the first 10 % of 1200 digits, and the area under the ROC curve, where 10 % of the labels are
flipped to a random other class: means over five draws of flips (``benchmarks/data_debugging.py``) for an MLP trained for 12
epochs at learning rate .01 (short), 12 at .05 (medium) and 60 at .05 (converged); at random .1 and .5.

    |                  | short       | medium      | converged   | CPU s    |
    |------------------|-------------|-------------|-------------|----------|
    | "held_out"       | .832  .986  | .935  .998  | .947  .998  | 1.1 5.4  |
    | "loss"           | .832  .987  | .935  .998  | .727  .958  | 0.0 0.0  |
    | "training_loss"  | .793  .973  | .948  .998  | .958  .999  | 0.2 0.6  |
    | "self_influence" | .765  .975  | .883  .994  | .905  .996  | 9.1 10.5 |
    | "validation"     | .793  .953  | .582  .702  | .455  .588  | 2.3 9.0  |

So "held_out" is the default: its worst case is the best. "training_loss" costs next to nothing and is a little better once
wrong labels are being learnt. Exact self-influence is no better than TracIn's (area .969 in the first short run) and costs far
more. Deletion of the suspects of "held_out" lowered the test loss by .077 [.065, .088] (short) and .117 [.091, .142] (medium);
that of as many random examples raised it by .206 (fewer steps) and .015.

All take hard but right examples for wrong ones, and fail where wrong labels agree with each other: a class whose label is
mostly wrong looks right. "validation" further needs a run whose derivatives say something (see `retrograd.roughness`).

Cost: "held_out" ``subsets`` trainings, made together; "loss" one pass over the data, "training_loss" ``checkpoints`` passes
and as many states (replayed if not stored); "self_influence" with TracIn 6 gradients of each example and their products for
all pairs in blocks, with `Unrolled` an adjoint for each example; "validation" one adjoint.

References: Feldman and Zhang 2020, "What neural networks memorize and why" (leave-out estimates from random subsets);
Northcutt, Jiang, Chuang 2021, "Confident learning" (judging labels by held-out predictions); Pleiss, Zhang, Elenberg,
Weinberger 2020, "Identifying mislabeled data using the area under the margin ranking" (averages along training); Pruthi, Liu,
Kale, Sundararajan 2020, "Estimating training data influence by tracing gradient descent" (self-influence); Koh and Liang
2017, "Understanding black-box predictions via influence functions" (section 5.4, wrong labels).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from retrograd.adjoint import Adjoint, Queries, TracIn
from retrograd.attribution import self_influence
from retrograd.errors import InputError, NonFinite
from retrograd.evaluation import retrain
from retrograd.selection.effects import effects, refuse_shared, slopes
from retrograd.selection.selection import Effect, Selection
from retrograd.trajectory import TrainingState, Trajectory
from retrograd.trajectory.trajectory import to_device

Method = Literal["held_out", "loss", "training_loss", "self_influence", "validation"]
METHODS = ("held_out", "loss", "training_loss", "self_influence", "validation")
_BATCH = 1024


def find_mislabelled(
    run: Trajectory,
    *,
    method: Method = "held_out",
    share: float = 0.1,
    validation: Any = None,
    subsets: int = 20,
    checkpoints: int = 30,
    adjoint: Adjoint | None = None,
    seed: int = 0,
    verify: Any = None,
    repeats: int = 4,
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
) -> Selection:
    """Rank training examples by how likely their label is wrong, and propose to remove the first of them.

    Args:
        run: the recorded run.
        method: kind of suspicion.
        share: share of the examples to remove.
        validation: clean data, anything that `Examples` takes: ``method="validation"`` needs it, and ``predicted``.
        subsets: of ``"held_out"``, number of halves that are trained; even.
        checkpoints: of ``"training_loss"``, number of states; fewer if the run has fewer steps.
        adjoint: of ``"self_influence"``, how it is computed; by `TracIn` if not given.
        seed: of the halves, the random removals and the shuffles.
        verify: validation data on which to measure what the removal does, by retraining without the suspects.
        repeats: of ``verify``, how many retrainings with other orders each change gets where seeds are the recorded ones,
            and how many random removals are made.
        seeds: of ``verify``, fresh seeds; the recorded ones if not given.
        initialise: of ``verify``, makes a model for a fresh seed.

    Returns:
        ``values``: suspicion, in units of the loss (for the two kinds of influence, per unit of weight or factor);
        ``weights``: 0 for the most suspect, 1 for the others; ``predicted``: exact change, to first order, of the mean loss
        on ``validation`` by removing them; ``verified``: what deletion gave on ``verify``, for the ``"selected"``, for as many
        at ``"random"``, and for as many of the highest final ``"loss"`` (unless that is the method). Deletion keeps the
        number of epochs and so makes fewer steps, which the prediction (by weight 0) leaves out, and which ``"random"`` shows.

    Raises:
        InputError: an argument is not what is allowed.
        NonFinite: a retraining has diverged.

    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> data = (torch.ones(3, 1), torch.tensor([[1.0], [1.0], [-1.0]]))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.25), order=torch.arange(3)[None])
    >>> find_mislabelled(run, method="loss", share=0.3).removed_ids               # θ₁ = 1/6, losses (y − 1/6)²
    tensor([2])
    """
    _check(run, method, share, validation, subsets, checkpoints, repeats, verify, seeds)
    slope = None if validation is None else slopes(run, validation)
    if method == "held_out":
        values = held_out_losses(run, subsets, seed)
    elif method == "loss":
        values = _losses(run, run.final_state)
    elif method == "training_loss":
        states = (run.state(step) for step in run.spread(min(checkpoints, max(len(run), 1))))
        values = torch.stack([_losses(run, state) for state in states]).mean(0)
    elif method == "self_influence":
        values = -self_influence(run, method=adjoint or TracIn(min(6, max(len(run), 1))))
    else:
        assert slope is not None
        values = slope
    count = max(round(share * len(run.examples)), 1)
    weights = _without(values, count)
    verified: dict[str, Effect] = {}
    if verify is not None:
        random = torch.rand(repeats, len(weights), generator=torch.Generator().manual_seed(seed))
        changes = {"selected": weights[None], "random": torch.stack([_without(row, count) for row in random])}
        if method != "loss":
            changes["loss"] = _without(_losses(run, run.final_state), count)[None]
        options: dict[str, Any] = {"repeats": repeats, "seeds": seeds, "initialise": initialise, "seed": seed}
        verified = effects(run, verify, changes, removal="deletion", **options)
    predicted = None if slope is None else -slope[weights == 0].sum().item()
    return Selection(run.examples.ids, values, weights, method, predicted, verified)


def held_out_losses(run: Trajectory, subsets: int = 20, seed: int = 0) -> Float[Tensor, " example"]:
    """Return each example's mean loss over retrainings on random halves that left it out.

    Args:
        run: the recorded run.
        subsets: number of halves, even.
        seed: of the draw.

    Raises:
        NonFinite: for some example all such retrainings have diverged.
    """
    kept = halves(len(run.examples), subsets, seed)
    found = retrain(run, Queries(run.examples, of="losses"), 2.0 * kept).outcomes
    outside = ~kept & found.isfinite()
    if not outside.any(0).all():
        raise NonFinite(
            f"for {int((~outside.any(0)).sum())} examples all retrainings without them became non-finite. Take more subsets, "
            "or a run with a lower learning rate."
        )
    return torch.where(outside, found, 0).sum(0) / outside.sum(0)


def halves(total: int, subsets: int, seed: int) -> Bool[Tensor, "subset example"]:
    """Draw random halves of the examples, each followed by its complement (one larger if their number is odd)."""
    generator = torch.Generator().manual_seed(seed)
    firsts = [torch.randperm(total, generator=generator) < total // 2 for _ in range(subsets // 2)]
    return torch.stack([part for first in firsts for part in (first, ~first)])


def _losses(run: Trajectory, state: TrainingState) -> Float[Tensor, " example"]:
    """The loss of each training example at a state."""
    with torch.no_grad():
        parts = [
            run.update_map.losses(state, to_device(run.examples.batch(ids), run.device)).detach().cpu()
            for ids in run.examples.ids.split(_BATCH)
        ]
    return torch.cat(parts)


def _without(values: Float[Tensor, " example"], count: int) -> Float[Tensor, " example"]:
    """Weight 0 for the ``count`` highest values, 1 for the others."""
    order = torch.argsort(values, descending=True, stable=True)
    return torch.ones(len(values)).index_fill(0, order[:count], 0.0)


def _check(
    run: Trajectory,
    method: str,
    share: float,
    validation: Any,
    subsets: int,
    checkpoints: int,
    repeats: int,
    verify: Any,
    seeds: Sequence[int] | None,
) -> None:
    """Refuse what can't be done, before anything is trained."""
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not 0 < share < 1 or len(run.examples) < 2 or round(share * len(run.examples)) == len(run.examples):
        raise InputError(
            f"share is the share of examples to remove, above 0, and some must stay; got {share} of {len(run.examples)}."
        )
    if method == "validation" and validation is None:
        raise InputError('method="validation" asks which examples harm clean data: give some as validation=.')
    if subsets < 2 or subsets % 2:
        raise InputError(f"subsets are halves and their complements, so their number is even and at least 2, got {subsets}.")
    if checkpoints < 1 or repeats < 1:
        raise InputError(f"checkpoints and repeats must be at least 1, got {checkpoints} and {repeats}.")
    if verify is None and seeds is not None:
        raise InputError("seeds are for the retrainings that verify a removal: give data to measure on as verify=.")
    if method == "validation" and verify is not None:
        refuse_shared(validation, verify)
