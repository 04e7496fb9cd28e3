"""How much of each method belongs into a blend, read off two or more runs that differ in their seeds alone.

With x_mr the scores of method m at run r, centred and scaled to unit spread for each query, and means over queries and runs,

    same_mk = ⟨x_mr, x_kr⟩,    cross_mk = ⟨x_mr, x_ks⟩ with r ≠ s,    M = (same + (R − 1) cross) / R,    v ∝ M⁻¹ cross_·1

These are the normal equations of the best linear predictor of the truth, without the truth: the first method is exact, so its
mean over seeds is what random subsets with fresh seeds respond to, and its value at *another* run is that truth plus noise that
nothing at this run shares. So cross_m1 measures how much of method m is truth, and cross_11 how much of the first is. The
expected correlation of the blend with the truth follows too:

    v · cross_·1 / √(vᵀ M v · cross_11)

What it explains: the exact adjoint's error is this run's seed, which averaging over R runs divides by R; SOURCE's is bias,
which stays. So the share of SOURCE falls from about a half at one run as runs are added.

Assumptions: the first method is unbiased over seeds, and runs are independent. Gauss-Newton unrolling is biased, and so are
exact derivatives of a rough run: on converged digits agreement gave SOURCE .11 where .5 is best, and promised .84 for .59. So
`blended` takes equal shares there, by the roughness that was measured with the scores, as it does for one run alone. Cost:
nothing beside the scores. Source: ours; the idea is that of instrumental variables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from retrograd.adjoint.unrolled import TAMED_FROM
from retrograd.attribution.scores import Scores
from retrograd.errors import InputError

_LEAST_AGREEMENT = 1e-3  # of the first method with itself at other seeds, below which nothing can be told


@dataclass(frozen=True)
class Shares:
    """How much of each method belongs into a blend.

    Attributes:
        shares: one for each method, with sum 1.
        expected: expected correlation with the truth, of each method averaged over the runs and, last, of the blend.
    """

    shares: tuple[float, ...]
    expected: tuple[float, ...]


def shares_by_agreement(scores: Sequence[Sequence[Scores]], runs: int | None = None) -> Shares:
    """Find the shares that predict retraining with fresh seeds best, without retraining.

    Args:
        scores: ``scores[method][run]``, the exact method first, at least two runs.
        runs: how many runs the blend will average over; as many as there are scores if not given.

    Raises:
        InputError: there are fewer than two methods or runs, or the first method at one run says nothing about another.

    >>> truth, noise = torch.randn(3, 1, 500, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    >>> def at(run, error): return Scores(truth[0] + error * torch.randn(1, 500, generator=noise), torch.arange(500),
    ...                                   torch.tensor([0]), "some")
    >>> found = shares_by_agreement([[at(run, 1.0) for run in range(2)], [at(run, 0.5) for run in range(2)]], runs=1)
    >>> found.shares[1] > found.shares[0], found.expected[2] > max(found.expected[:2])
    (True, True)
    """
    if len(scores) < 2 or min(len(own) for own in scores) < 2 or len({len(own) for own in scores}) > 1:
        raise InputError(f"shares by agreement need two methods and two runs each, got {[len(own) for own in scores]} runs.")
    units = torch.stack([torch.stack([_unit(own.values) for own in each]) for each in scores])  # [method, run, query, example]
    methods, count = units.shape[:2]
    same, cross = torch.zeros(methods, methods, dtype=torch.float64), torch.zeros(methods, methods, dtype=torch.float64)
    for run in range(count):
        same += _inner(units[:, run], units[:, run]) / count
    for run, other in permutations(range(count), 2):
        cross += _inner(units[:, run], units[:, other]) / (count * (count - 1))
    if cross[0, 0] < _LEAST_AGREEMENT:
        raise InputError(
            f"the first method's scores at one run have a correlation of {cross[0, 0]:.3f} with those at another, so agreement "
            "tells nothing. Give shares, or more runs."
        )
    averaged = runs or count
    matrix = (same + (averaged - 1) * cross) / averaged
    best = torch.linalg.solve(matrix, cross[:, 0]).clamp(min=0)
    best = best / best.sum() if best.sum() > 0 else torch.full_like(best, 1 / methods)
    every = torch.cat([torch.eye(methods, dtype=torch.float64), best[None]])
    spread = torch.einsum("vm,mk,vk->v", every, matrix, every).sqrt()
    expected = (every @ cross[:, 0]) / (spread * cross[0, 0].sqrt())
    return Shares(tuple(best.tolist()), tuple(expected.tolist()))


def blended(scores: Sequence[Sequence[Scores]], name: str) -> Scores:
    """Average ``scores[method][run]`` over runs and blend them by their agreement, in the unit and at the spread of the first.

    The shares and what they promise are in the notes. Equal shares where a run is rough, or its roughness was not measured.
    """
    equal = Shares((1 / len(scores),) * len(scores), ())
    found = shares_by_agreement(scores) if all(_smooth(own) for own in scores[0]) else equal
    spread = torch.stack([_spread(own.values) for own in scores[0]]).mean(0)
    total = torch.zeros_like(scores[0][0].values, dtype=torch.float64)
    for share, own in zip(found.shares, scores, strict=True):
        total += share * torch.stack([_unit(one.values, centred=False) for one in own]).mean(0)
    mean = Scores.mean([one for own in scores for one in own])
    notes = {
        **mean.notes,
        "runs": len(scores[0]),
        "shares": ", ".join(f"{share:.3f}" for share in found.shares),
        "expected_correlation": found.expected[-1] if found.expected else None,
    }
    digest = ",".join(one.trajectory_digest for one in scores[0])
    return replace(mean, values=(total * spread).to(mean.values), method=name, notes=notes, trajectory_digest=digest)


def _smooth(scores: Scores) -> bool:
    """Whether scores were measured to be exact derivatives of a smooth run; not measured is not known."""
    return scores.notes.get("curvature") == "hessian" and scores.notes.get("amplification", math.inf) <= TAMED_FROM


def _spread(values: Tensor) -> Tensor:
    return values.double().std(dim=1, correction=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _unit(values: Tensor, centred: bool = True) -> Tensor:
    middle = values.double().mean(1, keepdim=True) if centred else 0.0
    return (values.double() - middle) / _spread(values)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Mean over queries of the correlations over examples, ``[method, method]``."""
    return torch.einsum("mqi,kqi->mk", left, right) / (left.shape[1] * left.shape[2])
