"""Remove what a query hangs on, train again, and see what becomes of it.

For each query q and count k, the k examples with the highest scores for q are removed and the model is trained again:

    change_q(k) = f_q(without the top k of q) − f_q(all)

A good method moves the measurement down, by more than random removals do. For margins, f_q falling below 0 is a flip: the
prediction was brittle. Subset removal is the test of a ranking's head, where the linear datamodeling score tests all of it.

Cost: one retraining for each query, count and method (many at once, see `retrain`).

Reference: Ilyas, Park, Engstrom, Leclerc, Madry (2022), "Datamodels: predicting predictions from training data", section 4.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.attribution import Scores
from retrograd.errors import InputError
from retrograd.evaluation.retraining import retrain
from retrograd.trajectory import Trajectory
from retrograd.trajectory.counterfactual import Removal


@dataclass(frozen=True)
class Brittleness:
    """What became of queries without the examples that they hang on.

    Attributes:
        counts: how many examples were removed.
        before: measurement of each query, trained on all examples.
        after: the measurement without the top examples, by method; ``"random"`` is the mean over random removals.
    """

    counts: tuple[int, ...]
    before: Float[Tensor, " query"]
    after: Mapping[str, Float[Tensor, "count query"]]

    def change(self, method: str) -> Float[Tensor, "count query"]:
        """Return by how much each measurement changed."""
        return self.after[method] - self.before

    def flipped(self, method: str) -> Float[Tensor, " count"]:
        """Return the share of the queries above 0 that fell to 0 or below."""
        positive = self.before > 0
        return (self.after[method][:, positive] <= 0).double().mean(1)


def brittleness(
    scores: Scores | Mapping[str, Scores],
    run: Trajectory,
    counts: Sequence[int] = (10, 20, 40, 80),
    *,
    queries: Any = None,
    removal: Removal = "zero_weight",
    draws: int = 5,
    seed: int = 0,
) -> Brittleness:
    """Remove the examples with the highest scores for each query, train again, and measure the query.

    Args:
        scores: scores of one method, or of several by name.
        run: the recorded run.
        counts: how many examples are removed.
        queries: what was asked, if the scores came from a file.
        removal: how they leave, by ``"zero_weight"`` or ``"deletion"``.
        draws: how many random removals stand beside each count.
        seed: of the random removals.

    Raises:
        InputError: counts are not between 1 and N − 1, or methods were asked other queries.

    >>> from torch import nn
    >>> from retrograd.attribution import attribute
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> data = (torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    >>> run = record(model, data, Regression("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    ...              order=torch.tensor([[0, 1, 2, 3]]))
    >>> scores = attribute(run, (torch.ones(1, 1), torch.zeros(1, 1)), check_roughness=False)
    >>> brittleness(scores, run, counts=[1, 2]).change("scores")                       # θ₁ = Σ w_i y_i / 4
    tensor([[-1.5000],
            [-2.2500]])
    """
    methods = {"scores": scores} if isinstance(scores, Scores) else dict(scores)
    if not methods or "random" in methods:
        raise InputError("give scores of at least one method; the name 'random' is taken by the control.")
    first = next(iter(methods.values()))
    asked = first.asked(queries)
    total, count = len(run.examples), len(asked)
    for name, own in methods.items():
        if not torch.equal(own.query_ids, asked.ids) or not torch.equal(own.example_ids, run.examples.ids):
            raise InputError(f"the scores of {name} are of other queries or examples than these.")
    if not counts or not all(0 < k < total for k in counts) or draws < 1:
        raise InputError(f"counts must be between 1 and {total - 1} and draws at least 1, got {list(counts)} and {draws}.")
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(total, generator=generator) for _ in range(draws)])
    rows = [torch.ones(1, total, dtype=torch.bool)]
    for k in counts:
        rows += [_without(own.values.argsort(dim=1, descending=True)[:, :k], total) for own in methods.values()]
        rows.append(_without(orders[:, :k], total))
    found = retrain(run, asked, torch.cat(rows), removal=removal).outcomes
    before, *parts = found.split([len(row) for row in rows])
    after: dict[str, list[Tensor]] = {name: [] for name in (*methods, "random")}
    for name, part in zip([*after] * len(counts), parts, strict=True):
        after[name].append(part.mean(0) if name == "random" else part[torch.arange(count), torch.arange(count)])
    return Brittleness(tuple(counts), before[0], {name: torch.stack(values) for name, values in after.items()})


def _without(removed: Tensor, total: int) -> Tensor:
    """Rows of True with False at the places of ``removed``."""
    return torch.ones(len(removed), total, dtype=torch.bool).scatter(1, removed, False)
