"""How well suspicion finds examples with a wrong label.

With s_i the suspicion of example i, F the flipped and C the clean examples:

    AUC      = mean over i ∈ F, j ∈ C of [s_i > s_j] + [s_i = s_j] / 2
    recall_x = share of F among the first x·N examples, from the most suspicious on

Among ties the order is random, and recall is its expectation; x·N need not be whole. In random order the AUC is 0.5 and
recall_x is x. No recall can pass x N / |F|.

Suspicion comes, for instance, from self-influence, or better from the effect of an example on the loss of clean data: positive
where more weight on it raises that loss.

Assumes that examples are independent draws. Intervals are percentiles of a bootstrap that resamples flipped and clean examples
separately, as their numbers were planned. They have no width where detection is perfect. Cost: one sort, and a pass over the
sorted examples for each resample.

References: Hanley, McNeil 1982, "The meaning and use of the area under a receiver operating characteristic (ROC) curve";
Pruthi, Liu, Kale, Sundararajan 2020, "TracIn" (finding wrong labels by self-influence).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from retrograd.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: what was measured.
        low: lower end of the interval.
        high: upper end.
        confidence: what share of such intervals cover the truth.
        chance: what to expect of a random order.
    """

    value: float
    low: float
    high: float
    confidence: float
    chance: float

    def __str__(self) -> str:
        """Give the value and its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Detection:
    """How well suspicion finds flipped labels.

    Attributes:
        auc: chance that a flipped example is more suspicious than a clean one.
        recall: from the share of examples inspected to the share of flipped ones found.
        examples: number N of examples.
        flipped: how many of them have a wrong label.
    """

    auc: Estimate
    recall: Mapping[float, Estimate]
    examples: int
    flipped: int

    def __str__(self) -> str:
        """Give the area and the recalls in one line."""
        found = "".join(f", {value.value:.0%} found in the first {share:.0%}" for share, value in self.recall.items())
        return f"AUC {self.auc}{found}"


def mislabelled_detection(
    suspicion: Shaped[Tensor, " example"],
    flipped: Bool[Tensor, " example"],
    shares: tuple[float, ...] = (0.1, 0.2),
    *,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Detection:
    """Measure how well suspicion finds examples with a wrong label.

    Args:
        suspicion: bigger is more suspect; only its order counts.
        flipped: which examples have a wrong label.
        shares: of the examples to inspect, each between 0 and 1.
        resamples: number of bootstrap resamples.
        confidence: of the intervals.
        seed: of the resampling.

    Returns:
        Area under the ROC curve, and recall at each share.

    Raises:
        InputError: shapes differ, nothing or everything is flipped, a suspicion is NaN, or an argument is out of its range.

    >>> flipped = torch.tensor([True, False, False, True])
    >>> found = mislabelled_detection(torch.tensor([0.9, 0.1, 0.4, 0.3]), flipped, shares=(0.5,))
    >>> found.auc.value, found.recall[0.5].value          # one of the two pairs of the second flip is in wrong order
    (0.75, 0.5)
    """
    _check(suspicion, flipped, shares, resamples, confidence)
    suspicion, flipped = suspicion.detach().cpu(), flipped.cpu()
    _, group = torch.unique(suspicion, return_inverse=True)  # ascending; ties are in one group
    groups = int(group.max()) + 1
    where = {True: group[flipped], False: group[~flipped]}

    # Counts of flipped and clean examples in each group, from the most suspicious on, are all that matters.
    def statistics(bad: Tensor, good: Tensor) -> list[float]:
        bad, good = bad.flip(0).double(), good.flip(0).double()
        below = good.sum() - good.cumsum(0)
        auc = (bad * (below + good / 2)).sum() / (bad.sum() * good.sum())
        everything = bad + good
        before = everything.cumsum(0) - everything
        found = [auc.item()]
        for share in shares:
            # What of each group is inspected; the last one in part, and then in random order.
            part = ((share * everything.sum() - before) / everything.clamp(min=1)).clamp(0, 1)
            found.append(((part * bad).sum() / bad.sum()).item())
        return found

    def drawn(of: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bincount(of[torch.randint(0, len(of), (len(of),), generator=generator)], minlength=groups)

    values = statistics(*(torch.bincount(where[kind], minlength=groups) for kind in (True, False)))
    generator = torch.Generator().manual_seed(seed)
    again = torch.tensor(
        [statistics(*(drawn(where[kind], generator) for kind in (True, False))) for _ in range(resamples)], dtype=torch.float64
    )
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = again.quantile(tails, dim=0).tolist()
    auc, *recall = (
        Estimate(value, min(value, bottom), max(value, top), confidence, chance)
        for value, bottom, top, chance in zip(values, low, high, (0.5, *shares), strict=True)
    )
    return Detection(auc, dict(zip(shares, recall, strict=True)), len(flipped), int(flipped.sum()))


def _check(suspicion: Tensor, flipped: Tensor, shares: tuple[float, ...], resamples: int, confidence: float) -> None:
    """Refuse what has no area or recall."""
    if suspicion.shape != flipped.shape or suspicion.dim() != 1:
        raise InputError(
            f"suspicion and flipped must both have shape [example], got {tuple(suspicion.shape)} and {tuple(flipped.shape)}."
        )
    if not 0 < int(flipped.sum()) < len(flipped):
        raise InputError(
            f"{int(flipped.sum())} of {len(flipped)} examples are flipped. Detection is measured between flipped and clean "
            f"ones: give at least one of each."
        )
    if suspicion.isnan().any():
        raise InputError(f"suspicion is NaN for {int(suspicion.isnan().sum())} examples. Leave them out, or score them anew.")
    if not all(0 < share <= 1 for share in shares):
        raise InputError(f"shares must lie above 0 and not above 1, got {shares}.")
    if resamples < 2 or not 0 < confidence < 1:
        raise InputError(
            f"an interval needs at least 2 resamples and a confidence between 0 and 1, got resamples={resamples} and "
            f"confidence={confidence}."
        )
