"""Predicted against actual: compare scores with retraining, and say what to try where they fail.

`evaluate` compares scores with retrainings that exist; `check` makes some first, within a budget, and stores the comparison
with the scores.

Random halves are retrained in complementary pairs. If outcomes were sums of one number for each example, the two outcomes of
a pair would move in opposite directions exactly; how far they do bounds what *any* scores can predict (`additive_ceiling`).
So a check can tell a method that predicts badly from a question that has no better answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.attribution import Check, Scores
from retrograd.errors import InputError, NonFinite
from retrograd.evaluation.agreement import calibration, linear_datamodeling_score
from retrograd.evaluation.reliability import additive_ceiling, noise_ceiling, one_seed_wall
from retrograd.evaluation.retrained import Retrained
from retrograd.evaluation.retraining import retrain
from retrograd.evaluation.subsets import random_subsets
from retrograd.trajectory import Trajectory
from retrograd.trajectory.roughness import AMPLIFICATION_LIMIT, SMOOTH_ENOUGH

FEWEST, MOST = 16, 200  # subsets: a correlation over fewer says nothing; more tell little that is new
SMALL_REMOVAL = 0.9  # scores for small removals are checked by keeping this share
HOLDS = 0.8  # correlation from which on predictions are taken to hold


def evaluate(scores: Scores, retrained: Retrained, *, seed: int = 0) -> Check:
    """Compare what scores predict with what retraining gave.

    Args:
        scores: scores of some method.
        retrained: retrainings of the same run, measured on the same queries.
        seed: of the bootstrap.

    Returns:
        The comparison, with its intervals over subsets and queries and, where the retrainings show them, its ceilings.

    Raises:
        InputError: they are of other examples or queries.
        NonFinite: a retraining became non-finite.
    """
    for name in ("example_ids", "query_ids"):
        if not torch.equal(getattr(scores, name), getattr(retrained, name)):
            raise InputError(f"scores and retrainings have different {name}; they must agree, in order.")
    if not retrained.values.isfinite().all():
        raise NonFinite("some retrainings became non-finite. Leave them out, or lower the learning rate of the run.")
    predicted, actual = scores.predicted_subset(retrained.factors).double(), retrained.outcomes.double()
    ceilings: dict[str, float] = {}
    if len(retrained.seeds) > 1:
        ceilings["noise"] = noise_ceiling(retrained.values.double()).value
        ceilings["one seed"] = one_seed_wall(retrained.values.double()).value
    pairs = _complementary(retrained.factors)
    if pairs is not None:
        ceilings["additive"] = additive_ceiling(actual[pairs], actual[pairs + 1]).value
    together = 1 if pairs is None else 2  # the second of a pair says little that the first did not
    found = Check(
        predicted,
        actual,
        pearson=linear_datamodeling_score(predicted, actual, ranks=False, together=together, seed=seed),
        spearman=linear_datamodeling_score(predicted, actual, together=together, seed=seed),
        slope=calibration(predicted, actual, together=together, seed=seed),
        counterfactual=retrained.counterfactual,
        examples=len(retrained.example_ids),
        seeds=len(retrained.seeds),
        ceilings=ceilings,
    )
    return replace(found, advice=advice(scores, found))


def check(
    scores: Scores,
    run: Trajectory,
    subsets: int | None = None,
    *,
    queries: Any = None,
    keep: float | None = None,
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
) -> Scores:
    """Retrain the run on random subsets and store what came out beside what the scores predict.

    Args:
        scores: what `attribute` gave for this run.
        run: the recorded run.
        subsets: how many random subsets are retrained; if not given, as many as take no more processor time than the scores
            themselves took, but between 16 and 200.
        queries: what was asked, if the scores came from a file.
        keep: share of the examples that stays: that of the scores' counterfactual if not given, 0.9 for small removals.
        seeds: fresh seeds to train each subset with; needed if the scores are meant for fresh seeds.
        initialise: makes a model for a fresh seed (see `retrain`).
        seed: of the subsets.

    Returns:
        The scores with ``check``.

    Raises:
        InputError: the scores are of another run or lack their queries.

    >>> from retrograd.attribution import attribute
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> draw = torch.Generator().manual_seed(0)
    >>> data = (torch.randn(20, 2, generator=draw), torch.randn(20, 1, generator=draw))
    >>> run = record(nn.Linear(2, 1), data, Regression("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), epochs=3,
    ...              batch_size=5)
    >>> scores = check(attribute(run, data, keep=0.5), run, subsets=20)
    >>> scores.check.pearson.value > 0.99, str(scores.check)[-41:]
    (True, 'at keeping 50% by weight zero, same seeds')
    """
    asked = scores.asked(queries)
    if run.digest not in scores.trajectory_digest.split(",") or run.counterfactual.keep != 1.0:
        raise InputError(
            "the scores are of another run than the one to retrain. Give the recorded run that was attributed (one that was "
            "recorded with keep=1: a run of matched training time cannot be retrained in its place)."
        )
    if (scores.counterfactual.seeds == "fresh") != (seeds is not None):
        raise InputError(
            f"the scores are meant for {scores.counterfactual.seeds} seeds. For fresh seeds give seeds=[...] and initialise=; "
            "for the same seeds leave them out, or attribute with seeds='fresh'."
        )
    if subsets is not None and subsets < 3:
        raise InputError(f"a correlation needs at least 3 subsets, got {subsets}.")
    own = scores.counterfactual
    share = keep if keep is not None else own.keep if own.keep < 1 else SMALL_REMOVAL

    def retrained(count: int, start: int) -> Retrained:
        half = share == 0.5 and count % 2 == 0 and len(run.examples) % 2 == 0
        kept = random_subsets(run, count, share, seed + start, complementary=half)
        return retrain(run, asked, kept, removal=own.removal, seeds=seeds, initialise=initialise, seed=seed + start)

    if subsets is not None:
        return replace(scores, check=evaluate(scores, retrained(subsets, 0), seed=seed))
    began = time.process_time()
    found = retrained(FEWEST, 0)
    each = (time.process_time() - began) / FEWEST
    affordable = min(int(float(scores.notes.get("seconds", 0.0)) / each), MOST) // 2 * 2 - FEWEST
    if affordable > 0:
        more = retrained(affordable, 1)
        values, factors = torch.cat([found.values, more.values]), torch.cat([found.factors, more.factors])
        found = replace(found, values=values, factors=factors)
    return replace(scores, check=evaluate(scores, found, seed=seed))


def advice(scores: Scores, found: Check) -> tuple[str, ...]:
    """Say what to try where predictions fail, each with the measured fact that speaks for it.

    Args:
        scores: the scores.
        found: their comparison with retraining.
    """
    r, notes, says = found.pearson.value, scores.notes, []
    if r >= HOLDS:
        if not found.slope.low <= 1.25 or not found.slope.high >= 0.8:
            says.append(
                f"The order is right but the size is not: actual changes are {found.slope.value:.2g} times the predicted ones. "
                "Multiply predicted changes by that, or use the scores for ranking only."
            )
        return tuple(says)
    asked, done = scores.counterfactual.keep, found.counterfactual.keep
    if asked > 0.95 and done < 0.8:
        says.append(
            f"The scores were linearised for small removals, the check kept {done:.0%}. Linearise there: attribute(..., "
            f"keep={done:g}); on digits that took exact scores from .53 to .99 (docs/linearisation.md)."
        )
    additive = found.ceilings.get("additive")
    if additive is not None and additive < HOLDS:
        says.append(
            f"No scores can do much better: complementary subsets show that any sum over examples correlates {additive:.2f} at "
            "most. Ask a smaller question (keep closer to 1), or train more smoothly."
        )
    wall, noise = found.ceilings.get("one seed"), found.ceilings.get("noise")
    if wall is not None and noise is not None and wall < noise - 0.05 and int(notes.get("runs", 1)) == 1:
        says.append(
            f"Scores of one run know one seed, and perfect knowledge of one seed gets {wall:.2f}, where the noise would allow "
            f"{noise:.2f}: average several runs, attribute([run1, run2, ...], ...)."
        )
    smooth, amplified = float(notes.get("metasmoothness", 1.0)), float(notes.get("amplification", 1.0))
    if smooth < SMOOTH_ENOUGH or amplified > AMPLIFICATION_LIMIT:
        says.append(
            f"Training is rough (metasmoothness {smooth:.2f}, rounding amplified {amplified:.3g} times): lower the learning "
            "rate, clip gradients, take larger batches or GELU for ReLU (docs/roughness.md)."
        )
    if notes.get("exact") is False:
        says.append(f"{scores.method} is approximate; method=Unrolled() is exact for the run (docs/choosing.md).")
    if found.pearson.high - found.pearson.low > 0.3:
        says.append(f"The interval is wide: check more subsets than {len(found.actual)}.")
    return tuple(says) or ("Nothing measured says why. Try more runs, a smaller question (keep closer to 1), another method.",)


def _complementary(factors: Tensor) -> Tensor | None:
    """The places of the first of each pair, if subsets come in pairs that share no example and together hold all."""
    kept = factors != 0
    if len(kept) < 6 or len(kept) % 2 or not torch.equal(kept[0::2], ~kept[1::2]):
        return None
    return torch.arange(0, len(kept), 2)
