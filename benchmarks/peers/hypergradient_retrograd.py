"""retrograd itself: the run is recorded on the clock, with all states ("all"), about √T ("sqrt") or few ("treeverse").

At the optimum of the logistic regression the penalties are a meta-module, and the run is one step of gradient descent.
"""

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from hypergradient_exchange import Problem, measure, penalty
from torch import Tensor, nn

from retrograd import All, Classification, FixedPoint, Queries, Sqrt, Treeverse, Unrolled, hypergradient, record

STATES = 8  # that Treeverse holds at once
SCHEDULES = {"all": All(), "sqrt": Sqrt(), "treeverse": Treeverse(states=STATES)}
recordings: list[float] = []


class Penalties(nn.Module):
    def __init__(self, log_l2: Tensor):
        super().__init__()
        self.log_l2 = nn.Parameter(log_l2)

    def forward(self, weight: Tensor) -> Tensor:
        return penalty(weight, self.log_l2)


class Penalised(Classification):
    def losses(self, model: Any, batch: Any, meta: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, labels = batch
        (weight,) = model.parameters()
        return F.cross_entropy(model(inputs), labels, reduction="none") + meta(weight)


def unrolled(problem: Problem) -> dict[str, Tensor]:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=problem.rate, momentum=problem.momentum)

    began = time.process_time()
    run = record(
        problem.model(),
        problem.train,
        Classification(),
        optimizer=optimizer,
        order=problem.order,
        checkpoints=SCHEDULES[problem.method],
    )
    recordings.append(time.process_time() - began)
    outcome = Queries(problem.validation, of="losses", mean=True)
    found = hypergradient(run, outcome, ("example_weights", "learning_rate"), method=Unrolled(), per_step=True)
    return {"example_weights": found["example_weights"][0], "learning_rate": found["learning_rate"][0, :, 0]}


def implicit(problem: Problem) -> dict[str, Tensor]:
    run = record(
        problem.model(),
        problem.train,
        Penalised(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=problem.step),
        order=torch.arange(len(problem.train[0]))[None],
        meta=Penalties(problem.log_l2.clone()),
    )

    def asked(model: Any) -> Tensor:
        inputs, labels = problem.validation
        return F.cross_entropy(model(inputs), labels)

    if problem.method == "cg":
        method = FixedPoint("conjugate_gradients", iterations=problem.terms, tolerance=1e-14)
    else:
        method = FixedPoint("neumann", iterations=problem.terms)
    found = hypergradient(run, asked, "meta", method=method)
    return {"log_l2": found["meta"]["log_l2"][0]}


if __name__ == "__main__":
    if sys.argv[3] in SCHEDULES:
        measure("retrograd", unrolled, lambda: {"record_seconds": min(recordings)})
    else:
        measure("retrograd", implicit)
