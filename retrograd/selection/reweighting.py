"""Weights for the training examples that lower the loss on validation data.

With f_i the factor on the recorded weight of example i, L the mean validation loss after training with f, and
g_i = ∂L/∂f_i its exact derivative through training, a round is one step of projected gradient descent:

    f ← P(f − η (g − ḡ) / sd(g)),       P: the nearest point with 0 ≤ f_i ≤ most and mean 1

P(x) = clip(x + c, 0, most) with the number c for which the mean is 1. A mean of 1 keeps the training time: without it the
cheapest way to lower a loss would be a longer or shorter training, which says nothing about the data. ḡ drops out by P; the
division by the standard deviation makes η a number without unit: with η = 1 an example one deviation above the mean loses its
weight.

How far a derivative can be trusted is not known before, so η is found by trying: the run is retrained with a grid of them, all
at once in one batched program, and the one with the lowest L stays. η = 0 is in the grid: where nothing helps, nothing changes.
Further rounds start from the run with the new weights, and stop where no step helps.

    predicted = Σ over rounds of Σ_i g_i (f_i after the round − f_i before it),        first order

Assumes a run whose derivatives say something (see `retrograd.roughness`; the first round warns), and few enough steps η that
the best of them on validation data is not just the luckiest. L is lowered on purpose, so it is no evidence: verification is on
other data, next to the same weights given to random examples, which have the same spread of weights but not the choice.

On digits with 10 % wrong labels (``benchmarks/data_debugging.py``, an MLP, three fresh seeds, five draws of labels) one round
changed the loss on test data by −.215 [−.238, −.193] after 12 epochs at learning rate .01, and by −.028 [−.042, −.014] at .05,
where derivatives reach less far; permuted weights by +.003 and +.002.

Cost a round: one adjoint of one query, and a training for each step of the grid, together; from the second on a training more.

References: Ren, Zeng, Yang, Urtasun 2018, "Learning to reweight examples for robust deep learning" (equation 3; there one
training step is unrolled); Maclaurin, Duvenaud, Adams 2015, "Gradient-based hyperparameter optimization through reversible
learning"; Engstrom et al. 2025, "Optimizing ML training with metagradient descent" (section 4, data weights); Condat 2016,
"Fast projection onto the simplex and the l1 ball".
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.adjoint import Queries
from retrograd.errors import InputError
from retrograd.evaluation import retrain
from retrograd.selection.effects import effects, refuse_shared, slopes
from retrograd.selection.selection import Effect, Selection
from retrograd.trajectory import Trajectory

STEPS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)


def reweight(
    run: Trajectory,
    validation: Any,
    *,
    step: float | Sequence[float] | None = None,
    rounds: int = 1,
    most: float = 2.0,
    verify: Any = None,
    draws: int = 4,
    seeds: Sequence[int] | None = None,
    initialise: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
) -> Selection:
    """Find example weights that lower the mean loss on validation data.

    Args:
        run: the recorded run.
        validation: examples whose mean loss is to fall, anything that `Examples` takes.
        step: size η of a step in standard deviations of the derivative; or several, of which the best on ``validation`` is
            taken, and none if none helps. A grid from 0.1 to 12.8 if not given.
        rounds: number of steps, each from the run with the weights of the one before.
        most: upper limit of a weight, above 1.
        verify: other validation data on which to measure what the weights do, by retraining.
        draws: of ``verify``, how often the weights are given to random examples.
        seeds: of ``verify``, fresh seeds; the recorded ones if not given.
        initialise: of ``verify``, makes a model for a fresh seed.
        seed: of the permutations.

    Returns:
        ``weights``: factors on the recorded weights, of mean 1; ``values``: minus the derivative at the recorded run, in units
        of the loss per unit of the factor, high where more weight helps; ``predicted``: change of the mean loss on
        ``validation``, to first order; ``verified``: what they did on ``verify``, ``"selected"`` and ``"permuted"``.

    Raises:
        InputError: an argument is not what is allowed, or ``verify`` has examples of ``validation``.
        NonFinite: a retraining has diverged.

    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> data = (torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]))
    >>> run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.25), order=torch.tensor([[0, 1]]))
    >>> found = reweight(run, (torch.ones(1, 1), torch.ones(1, 1)), step=0.5)       # θ₁ = (w₀ − w₁) / 4, L = (θ₁ − 1)²
    >>> found.weights, round(found.predicted, 6)                                    # ∂L/∂w = −½, ½
    (tensor([1.5000, 0.5000]), -0.5)
    """
    _check(rounds, most, draws, verify, seeds)
    steps = _steps(step)
    if verify is not None:
        refuse_shared(validation, verify)
    asked = Queries(validation, of="losses", mean=True)
    weights = torch.ones(len(run.examples), dtype=torch.float64)
    values, predicted, taken = torch.zeros(0), 0.0, []
    here = run
    for number in range(rounds):
        slope = slopes(run, validation, at=here if number else None)
        if not number:
            values = -slope
        proposals = torch.stack([stepped(weights, slope, size, most) for size in steps])
        best = 0
        if len(steps) > 1:
            losses = retrain(run, asked, proposals).outcomes[:, 0]
            best = int(losses.nan_to_num(nan=torch.inf).argmin())
        predicted += (slope.double() @ (proposals[best] - weights)).item()
        weights, taken = proposals[best], [*taken, steps[best]]
        if not steps[best]:
            break
        if number + 1 < rounds:
            here = run.rerun(weights=weights)
    verified: dict[str, Effect] = {}
    if verify is not None:
        generator = torch.Generator().manual_seed(seed)
        permuted = torch.stack([weights[torch.randperm(len(weights), generator=generator)] for _ in range(draws)])
        changes = {"selected": weights[None], "permuted": permuted}
        verified = effects(run, verify, changes, seeds=seeds, initialise=initialise, seed=seed)
    sizes = ", ".join(f"{size:g}" for size in taken)
    return Selection(run.examples.ids, values, weights.to(values), f"reweighting, steps {sizes}", predicted, verified)


def stepped(
    weights: Float[Tensor, " example"], slope: Float[Tensor, " example"], step: float, most: float
) -> Float[Tensor, " example"]:
    """Make one step of projected gradient descent.

    Args:
        weights: factors f before it.
        slope: derivative g of the loss by each of them.
        step: its size η, in standard deviations of the derivative.
        most: upper limit of a factor.

    Returns:
        P(f − η (g − ḡ) / sd(g)).
    """
    slope = slope.to(weights)
    spread = slope.std(correction=0)
    if not step or not spread:
        return weights
    target = weights - step * (slope - slope.mean()) / spread
    # The mean rises with the shift c, from 0 to the limit: halve the interval until nothing is left of it.
    low, high = -target.max(), most - target.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if (target + middle).clamp(0, most).mean() > 1 else (middle, high)
    return (target + low).clamp(0, most)


def _steps(step: float | Sequence[float] | None) -> tuple[float, ...]:
    """The steps to try, none among them if there is a choice."""
    steps = (float(step),) if isinstance(step, int | float) else (0.0, *map(float, STEPS if step is None else step))
    if not all(0 <= size < float("inf") for size in steps) or steps in ((), (0.0,)):
        raise InputError(f"step must be a number above 0, several, or None for a grid, got {step}.")
    return steps


def _check(rounds: int, most: float, draws: int, verify: Any, seeds: Sequence[int] | None) -> None:
    """Refuse what can't be done, before anything is trained."""
    if rounds < 1 or draws < 1:
        raise InputError(f"rounds and draws must be at least 1, got {rounds} and {draws}.")
    if not most > 1:
        raise InputError(f"most is the upper limit of weights whose mean is 1, so it must be above 1, got {most}.")
    if verify is None and seeds is not None:
        raise InputError("seeds are for the retrainings that verify the weights: give other data to measure on as verify=.")
