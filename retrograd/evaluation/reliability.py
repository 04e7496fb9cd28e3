"""The best that a prediction of retrained models can score: bounds from noise, from one seed, and from adding up examples.

Noise ceiling. The truth y_s = mean_r v_sr is a mean over R seeds of v_sr = f_s + noise, with subset s. The best prediction is
f, and corr(f, y) = √reliability. With ρ_h the correlation between means over two disjoint groups of h = ⌊R/2⌋ seeds, averaged
over many such splits, the mean over m seeds has, by Spearman (1910) and Brown (1910) for any m / h, and so for odd R too,

    reliability_m = k ρ_h / (1 + (k − 1) ρ_h),  k = m / h                 ceiling = √reliability_R

It holds for Pearson's correlation, so rank correlations are taken to those of normal variables, r = 2 sin(π ρ / 6), and the
result back. The root is concave and ρ_h of a query is noisy: a mean of roots is too low (by .05 with two noisy seeds), the root
of a mean too high where queries differ (by .03 to .2). So the ρ_h are drawn towards their mean until their variance is the one
left after that of sampling, then comes the root, query by query. In simulation this is within .005 of what the best
prediction scores, .02 where half of the queries have almost no noise and the others almost no signal.

One-seed wall. One more seed's own outcomes, known exactly, against the mean over R: mean_r corr(v_sr, mean over the R − 1
others), times ceiling_R / ceiling_{R−1}, because a mean over R − 1 is noisier (by 13 % if R = 2 and noise equals signal).

Additive ceiling. For half the examples S and the others Sᶜ, split outcomes, less their mean, in an odd part
o(S) = (f(S) − f(Sᶜ)) / 2 and an even part e(S) = (f(S) + f(Sᶜ)) / 2 − mean. S and Sᶜ are equally likely, so o and e are
uncorrelated and Var f = Var o + Var e. A sum of one number for each example has the same total for S and Sᶜ together, so about
its middle it is odd: its covariance with f is that with o, at most its own deviation times sd(o). Hence, with ρ the correlation
between f(S) and −f(Sᶜ),

    Pearson correlation ≤ √(Var o / (Var o + Var e)) = √((1 + ρ) / 2)

o also holds cubic and higher odd terms, which no sum can follow: an upper bound. Noise of seeds is half odd, half even, and
makes it looser. It bounds Pearson's correlation; ranks can pass it a little.

Assumes noise that is independent over seeds, and outcomes not far from normal: at a skewness of 1.2 the noise ceiling is
.01 to .03 too high. Intervals are those of `agreement`, over subsets (or pairs) and queries; seeds are not resampled. They are
about many subsets, the values about as many as given, as is a score. Cost: rankings and matrix products for each split.

References: Spearman 1910 and Brown 1910, both in the British Journal of Psychology 3; Park et al. 2023, "TRAK".
"""

import math
from collections.abc import Callable
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.attribution import Agreement
from retrograd.errors import InputError
from retrograd.evaluation.agreement import correlations, finite, interval, rank_shortfall, ranked, resampled, uniform

MOST_SPLITS = 30  # all of them up to 6 seeds


def noise_ceiling(
    values: Float[Tensor, "subset seed query"],
    *,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Estimate the rank correlation with the mean over seeds that no prediction can pass.

    Args:
        values: the measurement after retraining on each subset with each of R seeds.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling, and of the splits where there are too many for all.

    Returns:
        The mean over queries, between 0 and 1. ``per_query`` is drawn towards the mean (see the module).

    Raises:
        InputError: fewer than 2 seeds or 3 subsets, or a number is not finite.

    >>> values = torch.arange(12.0).reshape(4, 1, 3).expand(4, 2, 3)                    # seeds agree: no noise
    >>> round(noise_ceiling(values).value, 6)
    1.0
    """
    values = _checked(values)
    halves = _HalfCorrelations(values, seed)

    k = values.shape[1] / halves.size

    def root(rho: Tensor) -> Tensor:
        return _to_ranks((k * rho / (1 + (k - 1) * rho)).sqrt())

    def roots(rows: Tensor, columns: Tensor) -> Tensor:
        return root(halves.shrunk(rows, columns))

    rho = halves.shrunk(uniform(len(values)), uniform(values.shape[2]))
    more = (rho + rank_shortfall(_to_ranks(rho), len(values))).clamp(max=1)  # over many subsets
    return _estimate(roots, values, resamples, confidence, seed, (root(more) - root(rho)).mean().item())


def one_seed_wall(
    values: Float[Tensor, "subset seed query"],
    *,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Estimate what one more seed's own outcomes, known exactly, would score against the mean over these seeds.

    Args:
        values: the measurement after retraining on each subset with each of R seeds.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling, and of the splits where there are too many for all.

    Returns:
        The rank correlation, mean over queries, to compare with a linear datamodeling score against the mean over all R.

    Raises:
        InputError: fewer than 2 seeds or 3 subsets, or a number is not finite.

    >>> values = torch.arange(12.0).reshape(4, 1, 3).expand(4, 2, 3)                    # seeds agree: one knows all
    >>> round(one_seed_wall(values).value, 6)
    1.0
    """
    values = _checked(values)
    count = values.shape[1]
    halves = _HalfCorrelations(values, seed)
    alone = [ranked(values[:, r]) for r in range(count)]
    others = [ranked((values.sum(1) - values[:, r]) / (count - 1)) for r in range(count)]

    def against_all(rows: Tensor, columns: Tensor) -> Tensor:
        against_others = _mean_correlation(list(zip(alone, others, strict=True)), rows)
        # ceiling_R / ceiling_{R-1}, with ρ_h cancelled from above and below, so that it is defined at 0 too.
        rho, size = halves.shrunk(rows, columns), halves.size
        squared = count / (count - 1) * (1 + ((count - 1) / size - 1) * rho) / (1 + (count / size - 1) * rho)
        return _to_ranks((_to_normal(against_others) * squared.sqrt()).clamp(-1, 1))

    shift = rank_shortfall(against_all(uniform(len(values)), uniform(values.shape[2])), len(values)).mean().item()
    return _estimate(against_all, values, resamples, confidence, seed, shift)


def additive_ceiling(
    first: Float[Tensor, "pair query"],
    second: Float[Tensor, "pair query"],
    *,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Bound the Pearson correlation of every prediction that is a sum of one number for each kept example.

    Args:
        first: outcomes of retraining on random halves of the examples.
        second: outcomes of retraining on their complements. Which half of a pair is first makes no difference.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    Returns:
        The bound, mean over queries; 0 for a query that doesn't vary.

    Raises:
        InputError: shapes differ, fewer than 3 pairs, or a number is not finite.

    >>> first = torch.tensor([[1.0], [5.0], [2.0]])
    >>> round(additive_ceiling(first, 10 - first).value, 6)                             # f(S) + f(Sᶜ) = 10: additive
    1.0
    """
    if first.shape != second.shape or first.dim() != 2 or len(first) < 3 or first.shape[1] < 1:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise InputError(f"first and second must both have shape [pair, query] with at least 3 pairs, 1 query, got {shapes}.")
    first, second = finite("first", first), finite("second", second)
    odd, even = (first - second) / 2, (first + second) / 2
    even = even - even.mean(0)
    correction = len(first) / (len(first) - 1)  # the mean of the even part is estimated; that of the odd one is known to be 0

    def bound(rows: Tensor, columns: Tensor) -> Tensor:
        of_odd = rows @ odd.square()
        of_even = (rows @ even.square() - (rows @ even).square()).clamp(min=0) * correction
        return (of_odd / (of_odd + of_even).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()

    return _estimate(bound, first[:, None], resamples, confidence, seed, 0.0)


class _HalfCorrelations:
    """Rank correlations between means over disjoint groups of seeds, averaged over splits, on the scale of normal variables."""

    def __init__(self, values: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = values.shape[1] // 2
        splits = _splits(values.shape[1], generator)
        self.pairs = [(ranked(values[:, one].mean(1)), ranked(values[:, two].mean(1))) for one, two in splits]
        estimate = self.measured(uniform(len(values)))[0]
        self.kept = 1.0
        if len(estimate) > 1:
            sampling = self.measured(resampled(len(values), 200, generator)).var(0).mean()
            # The variance among equal queries exceeds its expectation in half of all studies: ask for a standard error more.
            excess = 1 + math.sqrt(2 / (len(estimate) - 1))
            self.kept = math.sqrt(max(0.0, 1 - excess * (sampling / estimate.var().clamp(min=1e-300)).item()))

    def measured(self, rows: Tensor) -> Tensor:
        """Give ρ_h [resample, query]."""
        return _to_normal(_mean_correlation(self.pairs, rows))

    def shrunk(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Give ρ_h [resample, query], drawn towards the mean of each resample; not below 0."""
        rho = self.measured(rows)
        middle = (columns * rho).sum(1, keepdim=True)
        return (middle + self.kept * (rho - middle)).clamp(0, 1)


def _splits(seeds: int, generator: torch.Generator) -> list[tuple[list[int], list[int]]]:
    """Give pairs of disjoint groups of half the seeds: all of them if they are few, else random ones."""
    size = seeds // 2
    if math.comb(seeds, size) * math.comb(seeds - size, size) // 2 > MOST_SPLITS:
        orders = [torch.randperm(seeds, generator=generator).tolist() for _ in range(MOST_SPLITS)]
        return [(order[:size], order[size : 2 * size]) for order in orders]
    groups = [list(group) for group in combinations(range(seeds), size)]
    return [(one, two) for one in groups for two in groups if one < two and not set(one) & set(two)]


def _checked(values: Tensor) -> Tensor:
    """Refuse what says nothing about noise."""
    if values.dim() != 3 or len(values) < 3 or values.shape[1] < 2 or values.shape[2] < 1:
        raise InputError(
            f"values must have shape [subset, seed, query] with at least 3 subsets, 2 seeds and 1 query, got "
            f"{tuple(values.shape)}. Noise shows only between seeds: retrain every subset with 2 or more."
        )
    return finite("values", values)


def _mean_correlation(pairs: list[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Average correlations [resample, query] over pairs, one pair at a time in memory."""
    return sum((correlations(*pair, rows) for pair in pairs), torch.zeros(())) / len(pairs)


def _estimate(
    statistic: Callable[[Tensor, Tensor], Tensor], values: Tensor, resamples: int, confidence: float, seed: int, shift: float
) -> Agreement:
    """Average a statistic [resample, query] of weights over subsets and queries, with its interval."""
    size = (len(values), values.shape[2], 1)

    def mean(rows: Tensor, columns: Tensor) -> Tensor:
        return (columns * statistic(rows, columns)).sum(1)

    value, low, high = interval(mean, size, resamples, confidence, seed, correlation=True, shift=shift)
    return Agreement(value, max(low, min(value, 0.0)), high, confidence, statistic(uniform(size[0]), uniform(size[1]))[0])


def _to_normal(ranks: Tensor) -> Tensor:
    """Give Pearson's correlation of normal variables with this rank correlation."""
    return 2 * (math.pi / 6 * ranks).sin()


def _to_ranks(normal: Tensor) -> Tensor:
    """Give the rank correlation of normal variables with this Pearson correlation."""
    return 6 / math.pi * (normal / 2).asin()
