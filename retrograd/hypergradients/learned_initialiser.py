"""Starts that are predicted from past solutions: where training should begin, from what is known of a problem.

    x_0 = G(c),      min over G of  Σ_k ‖G(c_k) − x_k‖²,   then, if asked,  of  Σ_k f(training from G(c_k), c_k)

c_k    context of problem k, x_k a solution that was found before, f what is minimised. The second part goes through training:
       dG is driven by the costates of each problem's first state.

All problems are trained in one recorded run, as examples of it. Assumptions: solutions change smoothly with the context; of
problems with many solutions regression predicts a mean, which need not be near any. Training that has settled has forgotten its
start, and the derivative by it is zero: tune through few steps, use many. Cost: fitting is that of a regression; a step of
tuning costs a training of all problems and its way back.

Reference: Ahuja, Dhurandhar, Varshney (2020), "Learning to initialize gradient descent using gradient descent", arXiv
2012.12141. On matter related to it there is a US patent, 11915131; see ``docs/initialisation.md``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.adjoint import Outcome
from retrograd.hypergradients.hypergradient import hypergradient
from retrograd.progress import track
from retrograd.trajectory import All, Trajectory, record

Objective = Callable[[Tensor, Tensor], Tensor]
"""f(x, c): maps points [problem, number] and contexts [problem, …] to one number for each problem."""


class LearnedInitialiser:
    """Predicts where to begin from what is known of a problem.

    Args:
        network: G, maps contexts [problem, …] to points [problem, number].
    """

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, contexts: Tensor) -> Tensor:
        """Return a start for each context."""
        with torch.no_grad():
            return self.network(contexts)

    def fit(
        self, contexts: Tensor, solutions: Tensor, *, weights: Tensor | None = None, epochs: int = 1000, rate: float = 0.01
    ) -> list[float]:
        """Regress previous solutions on their contexts, and return the error of each epoch.

        Args:
            contexts: c_k, [problem, …].
            solutions: x_k, [problem, number].
            weights: how much each counts, for example less where the solution is a bad one.
            epochs: steps of Adam on all of them.
            rate: its learning rate, which falls to 0 along half a cosine.
        """
        share = torch.ones(len(contexts)).to(solutions) if weights is None else weights / weights.mean()

        def step(_: int) -> float:
            loss = (share[:, None] * (self.network(contexts) - solutions).square()).mean()
            loss.backward()
            return loss.item()

        return self._descend(step, epochs, rate)

    def tune(
        self,
        objective: Objective,
        contexts: Tensor,
        *,
        steps: int,
        learning_rate: float,
        epochs: int = 100,
        rate: float = 0.001,
    ) -> list[float]:
        """Lower the mean of what gradient descent from the predicted starts ends at, through all its steps.

        Args:
            objective: f.
            contexts: of the problems to do so on.
            steps: of descent.
            learning_rate: of descent.
            epochs: steps of Adam on G.
            rate: its learning rate, which falls to 0 along half a cosine.
        """
        run = solve(objective, contexts, self(contexts), steps=steps, learning_rate=learning_rate)
        asked = Outcome(lambda model: model(objective, contexts).mean())

        def step(_: int) -> float:
            starts = self.network(contexts)
            again = run.rerun(initial=replace(run.state(0), params={"points": starts.detach().clone()}))
            found = hypergradient(again, asked, "initial_params")
            starts.backward(found["initial_params"]["points"][0])
            return found.outcome[0].item()

        return self._descend(step, epochs, rate)

    def _descend(self, step: Callable[[int], float], epochs: int, rate: float) -> list[float]:
        optimizer = torch.optim.Adam(self.network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        history = []
        for number in track(range(epochs), "learning to initialise"):
            optimizer.zero_grad()
            history.append(step(number))
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        return history


def solve(objective: Objective, contexts: Tensor, starts: Tensor, *, steps: int, learning_rate: float) -> Trajectory:
    """Minimise f(·, c) by gradient descent for each context, and return one run of all; ``points`` are the parameters."""
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=learning_rate * len(starts))  # noqa: E731
    order = torch.arange(len(starts)).repeat(steps, 1)
    return record(_Points(starts), contexts, _Each(objective), optimizer=sgd, order=order, checkpoints=All())


class _Points(nn.Module):
    def __init__(self, points: Tensor):
        super().__init__()
        self.points = nn.Parameter(points.detach().clone())

    def forward(self, objective: Objective, contexts: Tensor) -> Tensor:
        return objective(self.points, contexts)


class _Each:
    def __init__(self, objective: Objective):
        self.objective = objective

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return model(self.objective, batch)

    measurements = losses
