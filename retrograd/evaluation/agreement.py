"""How well predicted outcomes of retraining agree with actual ones.

Linear datamodeling score (Park et al. 2023, equation 5), with s a subset, q a query, p predicted and a actual:

    LDS = mean_q corr_s(rank p_sq, rank a_sq)

Calibration, with the mean over subsets taken off within each query, so that constants of a query drop out:

    slope = Σ_q Σ_s (p_sq − p̄_q)(a_sq − ā_q) / Σ_q Σ_s (p_sq − p̄_q)²

Both are in no unit; a slope of 1 says that predicted changes have the right size.

Interval. Subsets and queries are both drawn at random, and all queries share the subsets, so resampling queries alone is too
narrow. A bootstrap of the subsets gives one variance, one of the queries another, and the interval uses their sum with
Student's t (degrees of freedom by Satterthwaite). Why not percentiles of resamples of both at once: they count the noise of
a single cell three times and the sum only twice (Owen 2007), and are too narrow for strongly related queries. Correlations get
their interval on Fisher's z scale, because they are skewed near 1. Spearman's sample value lies below that of many subsets by
3 (ρ − τ) / (n − 2), with τ Kendall's correlation (Hoeffding 1948): as much as the interval is wide for 50 subsets at ρ = 0.95.
The interval, which is about the value for many subsets, is moved by it; τ is that of normal variables with this ρ.

Assumes that subsets are independent draws (or lots of them are, ``together``), and queries too. Cost: a few matrix products of
[resamples × subsets] with [subsets × queries].

References: Park, Georgiev, Ilyas, Leclerc, Madry 2023, "TRAK"; Owen 2007, "The pigeonhole bootstrap"; Hoeffding 1948, "A class
of statistics with asymptotically normal distribution".
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.attribution import Agreement
from retrograd.errors import InputError
from retrograd.optional import optional


def linear_datamodeling_score(
    predicted: Float[Tensor, "subset query"],
    actual: Float[Tensor, "subset query"],
    *,
    ranks: bool = True,
    together: int = 1,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Correlate predicted and actual measurements over subsets, query by query.

    Args:
        predicted: predicted measurement (or its change) of each query after retraining on each subset.
        actual: the measurement after retraining.
        ranks: Spearman's rank correlation if True (the linear datamodeling score), else Pearson's.
        together: how many consecutive subsets were drawn together and are resampled together: 2 for complementary pairs.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    Returns:
        The mean over queries; 0 counts for a query that doesn't vary. The interval is about the correlation over many subsets
        and queries, and always holds the value.

    Raises:
        InputError: shapes differ, there are fewer than 3 subsets, or a number is not finite.

    >>> predicted = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> round(linear_datamodeling_score(predicted, predicted.exp()).value, 6)            # monotone: equal ranks
    1.0
    """
    left, right = _checked(predicted, actual)
    shift = 0.0
    if ranks:  # once, before resampling: a resample has ties, and ranking it anew would pull correlations down
        left, right = ranked(left), ranked(right)
        shift = rank_shortfall(correlations(left, right), len(left)).mean().item()

    def mean_correlation(rows: Tensor, columns: Tensor) -> Tensor:
        return (columns * correlations(left, right, rows)).sum(1)

    size = (len(left), left.shape[1], together)
    value, low, high = interval(mean_correlation, size, resamples, confidence, seed, correlation=True, shift=shift)
    return Agreement(value, low, high, confidence, correlations(left, right)[0])


def score_difference(
    predicted: Float[Tensor, "subset query"],
    other: Float[Tensor, "subset query"],
    actual: Float[Tensor, "subset query"],
    *,
    together: int = 1,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Measure by how much one method's linear datamodeling score exceeds another's on the same retrainings.

    Both meet the same subsets and queries, so much of what makes each score uncertain drops out of their difference.

    Args:
        predicted: predicted measurements of the one method.
        other: those of the other.
        actual: the measurements after retraining.
        together: how many consecutive subsets were drawn together: 2 for complementary pairs.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    >>> actual = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> round(score_difference(actual, -actual, actual).value, 6)
    2.0
    """
    left, right = _checked(predicted, actual)
    second, _ = _checked(other, actual)
    left, second, right = ranked(left), ranked(second), ranked(right)

    def mean_difference(rows: Tensor, columns: Tensor) -> Tensor:
        return (columns * (correlations(left, right, rows) - correlations(second, right, rows))).sum(1)

    size = (len(left), left.shape[1], together)
    value, low, high = interval(mean_difference, size, resamples, confidence, seed, correlation=False)
    return Agreement(value, low, high, confidence, (correlations(left, right) - correlations(second, right))[0])


def calibration(
    predicted: Float[Tensor, "subset query"],
    actual: Float[Tensor, "subset query"],
    *,
    together: int = 1,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Measure how much actual change goes with one unit of predicted change.

    Args:
        predicted: predicted measurement (or its change) of each query after retraining on each subset.
        actual: the measurement after retraining, in the same unit.
        together: how many consecutive subsets were drawn together and are resampled together: 2 for complementary pairs.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    Returns:
        The least-squares slope of actual against predicted change, pooled over queries: 1 where predictions have the right
        size, 0.5 where they are twice too large, 0 where they don't vary. ``per_query`` has the slope of each query alone.

    Raises:
        InputError: shapes differ, there are fewer than 3 subsets, or a number is not finite.

    >>> predicted = torch.tensor([[1.0, 0.0], [2.0, 5.0], [4.0, 1.0]])
    >>> round(calibration(predicted, 0.5 * predicted + torch.tensor([3.0, -7.0])).value, 6)
    0.5
    """
    left, right = _checked(predicted, actual)

    def pooled_slope(rows: Tensor, columns: Tensor) -> Tensor:
        covariance, variance, _ = _moments(left, right, rows)
        return _ratio((columns * covariance).sum(1), (columns * variance).sum(1))

    size = (len(left), left.shape[1], together)
    value, low, high = interval(pooled_slope, size, resamples, confidence, seed, correlation=False)
    covariance, variance, _ = _moments(left, right, uniform(len(left)))
    return Agreement(value, low, high, confidence, _ratio(covariance, variance)[0])


def interval(
    statistic: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, int, int],
    resamples: int,
    confidence: float,
    seed: int,
    *,
    correlation: bool,
    shift: float = 0.0,
) -> tuple[float, float, float]:
    """Give a statistic over random subsets and random queries with its interval.

    Args:
        statistic: from weights [resample, subset] and [resample, query], whose rows sum to 1 and either of which may have one
            row for all resamples, to the statistic of each resample.
        size: number of subsets, of queries, and of consecutive subsets that were drawn together.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.
        correlation: whether the statistic lies between -1 and 1, and gets its interval on Fisher's z scale.
        shift: where the middle of the interval lies from the value.

    Returns:
        The value, and the two ends.

    Raises:
        InputError: fewer than 2 resamples, or a confidence that is not between 0 and 1.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise InputError(
            f"an interval needs at least 2 resamples and a confidence between 0 and 1, got resamples={resamples} and "
            f"confidence={confidence}."
        )
    generator = torch.Generator().manual_seed(seed)
    subsets, queries, together = size
    if together < 1 or subsets % together or subsets // together < 2:
        raise InputError(f"{subsets} subsets are not at least two lots of {together} that were drawn together.")
    lots = subsets // together
    value = statistic(uniform(subsets), uniform(queries)).item()
    # A bootstrap of n draws has (n - 1) / n of the variance. One query has none to show: the interval is then about this query.
    rows = resampled(lots, resamples, generator).repeat_interleave(together, dim=1) / together
    parts = [(statistic(rows, uniform(queries)).var().item(), lots)]
    if queries > 1:
        parts.append((statistic(uniform(subsets), resampled(queries, resamples, generator)).var().item(), queries))
    parts = [(variance * count / (count - 1), count) for variance, count in parts]
    variance = sum(part for part, _ in parts)
    if variance < 1e-24:  # a perfect fit: nothing but rounding is left
        return value, value, value
    freedom = variance**2 / sum(part**2 / (count - 1) for part, count in parts)
    margin = optional("scipy.stats", "report").t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance)
    if not correlation:
        return value, min(value, value + shift - margin), max(value, value + shift + margin)
    within = min(max(value, -1 + 1e-9), 1 - 1e-9)
    # Few subsets can come out higher than their bias says is possible: half of the way to 1 is as far as the middle goes.
    room = (1 - abs(within)) / 2
    middle = within + min(max(shift, -room), room)
    z, margin = math.atanh(middle), margin / (1 - middle**2)
    return value, min(value, math.tanh(z - margin)), max(value, math.tanh(z + margin))


def correlations(left: Tensor, right: Tensor, rows: Tensor | None = None) -> Tensor:
    """Correlate column by column under each row of weights over subsets (default: equal ones); 0 where a column is constant."""
    covariance, first, second = _moments(left, right, uniform(len(left)) if rows is None else rows)
    return _ratio(covariance, (first * second).sqrt()).clamp(-1, 1)


def ranked(values: Tensor) -> Tensor:
    """Rank each column, ties sharing their mean rank."""
    return torch.from_numpy(optional("scipy.stats", "report").rankdata(values.numpy(), axis=0)).double()


def rank_shortfall(rho: Tensor, subsets: int) -> Tensor:
    """Give how far rank correlations over so few subsets lie below those over many."""
    tau = 2 / math.pi * (2 * (math.pi / 6 * rho).sin()).asin()
    return 3 * (rho - tau) / (subsets - 2)


def resampled(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Draw bootstrap weights [resample, count]: the share of each item among as many draws as there are items."""
    drawn = torch.randint(0, count, (resamples, count), generator=generator)
    one = torch.full((1, 1), 1 / count, dtype=torch.float64)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, one.expand(resamples, count))


def uniform(count: int) -> Tensor:
    """Give equal weights [1, count]."""
    return torch.full((1, count), 1 / count, dtype=torch.float64)


def finite(name: str, values: Tensor) -> Tensor:
    """Take measurements to where statistics are computed, float64 on the CPU, and refuse those that are not finite."""
    values = values.detach().cpu().double()
    if not values.isfinite().all():
        raise InputError(
            f"{name} holds {int((~values.isfinite()).sum())} of {values.numel()} numbers that are not finite. Leave out the "
            f"retrainings that diverged, or train with a smaller learning rate."
        )
    return values


def _checked(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what no statistic over subsets and queries can be computed from."""
    if predicted.shape != actual.shape or predicted.dim() != 2 or len(predicted) < 3 or predicted.shape[1] < 1:
        raise InputError(
            f"predicted and actual must both have shape [subset, query] with at least 3 subsets and 1 query, got "
            f"{tuple(predicted.shape)} and {tuple(actual.shape)}."
        )
    return finite("predicted", predicted), finite("actual", actual)


def _moments(left: Tensor, right: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give covariance and both variances [resample, query] under weights [resample, subset]."""
    left, right = left - left.mean(0), right - right.mean(0)  # first, or products of large numbers would cancel below
    covariance = rows @ (left * right) - (rows @ left) * (rows @ right)
    first, second = (rows @ each.square() - (rows @ each).square() for each in (left, right))
    return covariance, _rounded(first, left), _rounded(second, right)


def _rounded(variance: Tensor, centred: Tensor) -> Tensor:
    """Set variances to 0 that are only rounding beside the largest square of their column."""
    return torch.where(variance > 1e-14 * centred.square().max(0).values, variance, 0.0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide, with 0 where there is nothing to divide by."""
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
