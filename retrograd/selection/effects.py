"""What a change of the training data does to an outcome, paired with training on everything, and how sure that is.

    d[k, s, j] = outcome of draw k, seed s, validation example j − that of training on everything, same s and j
    change     = mean of d

The interval is that of a bootstrap over everything that could have come out differently: validation examples are drawn with
replacement, and so are seeds and draws where there are several, each independently of the others. Ends are percentiles.
Pairing takes out what seeds and validation examples have in common, mostly the far larger part of the spread.

A resample of n seeds or draws takes n − 1 of them: with n the spread would come out too small by √((n − 1) / n) (McCarthy and
Snowden 1985), much for the two to five that one can afford. Validation examples are many and need no such care.

A change of the data is retrained with recorded seeds, or with fresh ones. A *deletion* makes a new order of the batches
necessary even with recorded seeds, and one order is one draw of luck; so each is retrained with several orders (``repeats``),
which count as seeds. A mean over them is compared with the mean over as many orders of everything.

Assumes validation examples that are drawn independently. One seed gives an interval for this very training only, and two or
three give a rough one. Cost: one training for each draw and seed, many at once, and ``resamples`` means.

References: Efron 1979, "Bootstrap methods: another look at the jackknife"; McCarthy, Snowden 1985, "The bootstrap and finite
population sampling"; Owen 2007, "The pigeonhole bootstrap" (resampling rows and columns of a table).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from retrograd.adjoint import Adjoint, Queries
from retrograd.attribution import attribute
from retrograd.errors import InputError, NonFinite
from retrograd.evaluation import retrain
from retrograd.evaluation.course import example_weights
from retrograd.selection.selection import Effect
from retrograd.trajectory import Examples, Trajectory
from retrograd.trajectory.counterfactual import Removal


def effect(
    base: Float[Tensor, "seed query"],
    values: Float[Tensor, "draw seed query"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Effect:
    """Compare outcomes with those of training on everything.

    Args:
        base: outcome of training on everything for each seed and validation example.
        values: the same after the change; several draws of a random change, one of any other.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    Returns:
        Mean outcome, mean paired change, and its interval.

    Raises:
        InputError: shapes differ, or there is nothing to compare.
        NonFinite: a retraining has diverged.

    >>> found = effect(torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.5, 1.5]]]))
    >>> found.outcome, found.change, found.low, found.high          # both examples gain 0.5, so there is no spread
    (1.0, -0.5, -0.5, -0.5)
    """
    if values.shape[1:] != base.shape or not values.numel():
        raise InputError(
            f"outcomes must have shape [draw, seed, query], with the seeds and queries of everything, got "
            f"{tuple(values.shape)} and {tuple(base.shape)}."
        )
    if resamples < 2 or not 0 < confidence < 1:
        raise InputError(
            f"an interval needs at least 2 resamples and 0 < confidence < 1, got resamples={resamples} and "
            f"confidence={confidence}."
        )
    broken = int((~values.isfinite()).any(2).sum() + (~base.isfinite()).any(1).sum())
    if broken:
        raise NonFinite(f"{broken} retrainings became non-finite, so they have no effect; use another proposal or other seeds.")
    change = (values - base).double()
    generator = torch.Generator().manual_seed(seed)
    draws, seeds, queries = (_shares(size, resamples, generator) for size in change.shape)
    means = torch.einsum("rd,rs,rq,dsq->r", draws, seeds, queries, change)
    low, high = means.quantile(torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)).tolist()
    point = change.mean().item()
    # A percentile can lie beyond the point by rounding where nothing spreads.
    return Effect(values.double().mean().item(), point, min(low, point), max(high, point), len(base))


def effects(
    run: Trajectory,
    data: Any,
    changes: Mapping[str, Shaped[Tensor, "draw example"]],
    *,
    removal: Removal = "zero_weight",
    repeats: int = 4,
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
) -> dict[str, Effect]:
    """Retrain with changed example weights and measure the mean loss on validation data, all in one batched program.

    Args:
        run: the recorded run.
        data: validation examples, anything that `Examples` takes.
        changes: factor on each example's weight, by name; several draws of a random change, one of any other.
        removal: what a factor of 0 means: ``"zero_weight"`` or ``"deletion"``.
        repeats: orders of the batches for each deletion with recorded seeds; they count as seeds.
        seeds: fresh seeds; the recorded ones if not given.
        initialise: makes a model for a fresh seed.
        seed: of the shuffles and of the resampling.

    Returns:
        The effect of each change against training on everything.

    Raises:
        InputError: an argument is not what is allowed.
        NonFinite: a retraining has diverged.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    # Elsewhere repeating is of no use: with recorded seeds and batches the same comes out again, and fresh seeds are repeats.
    times = repeats if removal == "deletion" and seeds is None else 1
    everything = torch.ones(1, len(run.examples), dtype=torch.float64)
    factors = torch.cat([everything, *(rows.to(everything) for rows in changes.values())])
    queries = Queries(data, of="losses")
    found = retrain(
        run, queries, factors.repeat_interleave(times, 0), removal=removal, seeds=seeds, initialise=initialise, seed=seed
    )
    values = found.values.unflatten(0, (-1, times)).flatten(1, 2)
    parts = values[1:].split([len(rows) for rows in changes.values()])
    return {name: effect(values[0], part, seed=seed) for name, part in zip(changes, parts, strict=True)}


def slopes(
    run: Trajectory, data: Any, at: Trajectory | None = None, method: Adjoint | None = None
) -> Float[Tensor, " example"]:
    """Return how fast the mean loss on validation data rises with the factor on each example's recorded weight.

    By it the change f of the factors is predicted to change the mean loss by Σ_i slope_i (f_i − 1), to first order.

    Args:
        run: the recorded run.
        data: validation examples, anything that `Examples` takes.
        at: where to take the derivative: the run with other factors, if not at the recorded one.
        method: how costates are obtained; exact unrolling if not given.
    """
    # Three trainings more tell whether derivatives can be trusted; once for a run is enough.
    values = attribute(at or run, Queries(data, of="losses", mean=True), method=method, check_roughness=at is None).values[0]
    if all(record.weights is None for record in run.records):
        return values
    return values * example_weights(run).to(values)  # scores are per unit of weight, not of the factor on it


def refuse_shared(chosen_on: Any, verified_on: Any) -> None:
    """Refuse to verify on data that the choice was made on.

    Args:
        chosen_on: validation data of the choice, anything that `Examples` takes.
        verified_on: validation data of its verification.

    Raises:
        InputError: some examples, by their contents, are in both.
    """
    common = set(Examples.of(chosen_on).digests()) & set(Examples.of(verified_on).digests())
    if common:
        raise InputError(
            f"{len(common)} examples are in both the validation data and verify=. What was chosen to lower a loss on some data "
            "looks good on it whether it helps or not: give verify= other data, or leave it out."
        )


def _shares(size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """The share of each of ``size`` things in resamples of them, ``[resample, size]``."""
    taken = size if size > 30 or size == 1 else size - 1
    drawn = torch.randint(0, size, (resamples, taken), generator=generator)
    return torch.zeros(resamples, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / taken, dtype=torch.float64)
    )
