"""higher: the whole training in one graph; ``override`` puts a learning rate that is differentiated into each step."""

from typing import Any

import higher  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from hypergradient_exchange import Problem, measure
from torch import Tensor


def unrolled(problem: Problem) -> dict[str, Tensor]:
    (inputs, labels), (weights, rates) = problem.train, problem.hyperparameters()
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate, momentum=problem.momentum)
    functional: Any
    with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
        for ids, rate in zip(problem.order, rates.unbind(), strict=True):
            losses = F.cross_entropy(functional(inputs[ids]), labels[ids], reduction="none")
            differentiable.step((weights[ids] * losses).mean(), override={"lr": [rate]})
        inputs, labels = problem.validation
        asked = F.cross_entropy(functional(inputs), labels)
        by_weights, by_rates = torch.autograd.grad(asked, [weights, rates])
    return {"example_weights": by_weights, "learning_rate": by_rates}


if __name__ == "__main__":
    measure("higher", unrolled)
