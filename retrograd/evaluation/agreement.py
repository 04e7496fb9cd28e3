"""How well predicted outcomes of retraining agree with actual ones.

Linear datamodeling score (Park et al. 2023): for each query the Spearman rank correlation, over random subsets, between
the predicted and the actual measurement; then the mean over queries. The interval is a percentile bootstrap that
resamples subsets *and* queries: resampling queries alone is too narrow, because all of them share the subsets.
"""

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
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Correlate predicted and actual measurements over subsets, query by query.

    Args:
        predicted: predicted measurement (or its change) of each query after retraining on each subset.
        actual: the measurement after retraining.
        ranks: Spearman's rank correlation if True (the linear datamodeling score), else Pearson's.
        resamples: number of bootstrap resamples.
        confidence: of the interval.
        seed: of the resampling.

    >>> predicted = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> round(linear_datamodeling_score(predicted, predicted.exp()).value, 6)            # monotone: equal ranks
    1.0
    """
    if predicted.shape != actual.shape or predicted.dim() != 2 or len(predicted) < 3:
        raise InputError(
            f"predicted and actual must both have shape [subset, query] with at least 3 subsets, got {tuple(predicted.shape)} "
            f"and {tuple(actual.shape)}."
        )
    generator = torch.Generator().manual_seed(seed)
    if ranks:  # once, before resampling: a resample has ties, and ranking it anew would pull correlations down
        predicted, actual = _ranks(predicted), _ranks(actual)
    per_query = _correlations(predicted, actual)
    subsets, queries = predicted.shape
    means = torch.empty(resamples)
    for index in range(resamples):
        rows = torch.randint(0, subsets, (subsets,), generator=generator)
        columns = torch.randint(0, queries, (queries,), generator=generator)
        means[index] = _correlations(predicted[rows][:, columns], actual[rows][:, columns]).mean()
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail])).tolist()
    return Agreement(per_query.mean().item(), low, high, confidence, per_query)


def _correlations(left: Tensor, right: Tensor) -> Tensor:
    """Correlate column by column; 0 where a column is constant."""
    left, right = left.double() - left.double().mean(0), right.double() - right.double().mean(0)
    return (left * right).sum(0) / (left.norm(dim=0) * right.norm(dim=0)).clamp(min=torch.finfo(torch.float64).tiny)


def _ranks(values: Tensor) -> Tensor:
    """Rank each column, ties sharing their mean rank."""
    return torch.from_numpy(optional("scipy.stats", "report").rankdata(values.numpy(), axis=0))
