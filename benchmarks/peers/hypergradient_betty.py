"""Betty, of PyPI (0.1.1) or of its repository (0.2.1): two ways to unroll, two implicit solvers, and its finite differences.

Methods: "functorch" is its IterativeProblem, "higher" its HigherIterativeProblem, which sets momentum to zero without a word;
"cg" and "neumann" are implicit. Learning rates are the torch optimizer's, which it does not differentiate. "defects": conjugate
gradients with ``cg_alpha`` other than 1, and DARTS and SAMA differences of a network with dropout, beside the same with the
random numbers of both sides pinned.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from betty import hypergradient  # pyright: ignore[reportMissingImports]
from betty.configs import Config, EngineConfig  # pyright: ignore[reportMissingImports]
from betty.engine import Engine  # pyright: ignore[reportMissingImports]
from betty.problems import (  # pyright: ignore[reportMissingImports]
    HigherIterativeProblem,
    ImplicitProblem,
    IterativeProblem,
)
from hypergradient_exchange import Problem, distance, measure, penalty, textbook_solution, write
from torch import Tensor, nn

RADIUS = 0.01  # of the differences, times the norm of what is multiplied: Betty's default for DARTS
DROPOUT = 0.1


class Hyperparameter(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)


class Upper(ImplicitProblem):
    """Asks for the validation loss, and keeps the hypergradient where others would step."""

    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.lower(inputs), labels)

    def custom_optimizer_step(self) -> None:
        self.found = self.module.value.grad.clone()


def weighted(problem: Any, batch: Any) -> Tensor:
    ids, inputs, labels = batch
    return (problem.upper.module.value[ids] * F.cross_entropy(problem(inputs), labels, reduction="none")).mean()


class Functorch(IterativeProblem):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.fmodule(self.params, self.buffers, inputs)

    def training_step(self, batch: Any) -> Tensor:
        return weighted(self, batch)


class Higher(HigherIterativeProblem):
    def training_step(self, batch: Any) -> Tensor:
        return weighted(self, batch)


class Penalised(ImplicitProblem):
    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        (weight,) = self.module.parameters()
        return F.cross_entropy(self.module(inputs), labels) + penalty(weight, self.upper.module.value)


class Dropped(ImplicitProblem):
    pinned = False

    def training_step(self, batch: Any) -> Tensor:
        if self.pinned:
            torch.manual_seed(0)
        return weighted(self, batch)


def engine_of(lower: Any, problem: Problem, value: Tensor, steps: int, **config: Any) -> tuple[Any, Upper]:
    """Return an engine, initialised, and its upper problem."""
    module = Hyperparameter(value)
    upper = Upper(
        name="upper",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        train_data_loader=[problem.validation],
        config=Config(**config),
    )
    dependencies = {"l2u": {lower: [upper]}, "u2l": {upper: [lower]}}
    return Engine(problems=[upper, lower], config=EngineConfig(train_iters=steps), dependencies=dependencies), upper


def lower_of(kind: Any, module: nn.Module, loader: Any, rate: float, momentum: float = 0.0, **config: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum)
    return kind(name="lower", module=module, optimizer=optimizer, train_data_loader=loader, config=Config(**config))


def unrolled(problem: Problem) -> dict[str, Tensor]:
    inputs, labels = problem.train
    kind = {"functorch": Functorch, "higher": Higher}[problem.method]
    batches = [(ids, inputs[ids], labels[ids]) for ids in problem.order]
    options = {"unroll_steps": len(batches), "retain_graph": True}
    lower = lower_of(kind, problem.model(), batches, problem.rate, problem.momentum, **options)
    weights = problem.hyperparameters()[0].detach()
    engine, upper = engine_of(lower, problem, weights, len(batches), first_order=False)
    engine.run()
    return {"example_weights": upper.found}


def implicit(problem: Problem, terms: int | None = None, cg_alpha: float = 1.0) -> dict[str, Tensor]:
    terms = problem.terms if terms is None else terms
    options = {"cg_iterations": terms, "cg_alpha": cg_alpha}
    if problem.method == "neumann":
        options = {"neumann_iterations": terms, "neumann_alpha": problem.step}
    kind = "neumann" if problem.method == "neumann" else "cg"
    lower = lower_of(Penalised, problem.model(), [problem.train], problem.step, type=kind, **options)
    engine, upper = engine_of(lower, problem, problem.log_l2.clone(), 1)
    engine.run()
    return {"log_l2": upper.found}


def differences(problem: Problem, method: str, pinned: bool) -> tuple[float, float]:
    """Return the relative error of Betty's differences, and how far they leave the parameters from where they were."""
    (inputs, labels), generator = problem.train, torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(DROPOUT), nn.Linear(64, 10)).double()
    batch = torch.arange(len(labels)), inputs, labels
    lower = lower_of(Dropped, module, [batch], 0.1, type=method, **{RADII[method]: RADIUS})
    _, upper = engine_of(lower, problem, inputs.new_ones(len(labels)), 1)
    lower.pinned, lower.cur_batch = pinned, batch
    before = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    vector = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in before.items()}

    def losses(params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        return F.cross_entropy(torch.func.functional_call(module, params, inputs), labels, reduction="none")

    exact = -torch.func.jvp(losses, (before,), (vector,))[1] / len(labels)
    difference: Callable = hypergradient.jvp_fn_mapping[method]
    torch.manual_seed(2)
    found = difference(list(vector.values()), lower, upper, *([] if version("betty-ml") == "0.1.1" else [False]))
    after = torch.cat([leaf.detach().flatten() for leaf in module.parameters()])
    return distance(found[0], exact), distance(after, torch.cat([leaf.flatten() for leaf in before.values()]))


RADII = {"darts": "darts_alpha", "sama": "sama_adam_alpha"}


def defects(problem: Problem) -> None:
    exact = textbook_solution(problem, 1000)
    rows: list[list[Any]] = []
    for alpha, terms in ((0.1, 3), (0.1, 10), (0.1, 20), (1.0, 20)):
        found = distance(implicit(problem, terms, alpha)["log_l2"], exact)
        right = distance(textbook_solution(problem, terms), exact)
        rows.append([f"CG, cg_alpha = {alpha:g}, {terms} iterations: relative error", found, right])
    for method in ("darts", "sama"):
        if method in hypergradient.jvp_fn_mapping:
            (loose, moved), (pinned, _) = differences(problem, method, False), differences(problem, method, True)
            rows.append([f"{method.upper()}, dropout {DROPOUT:g}: relative error (right: masks pinned)", loose, pinned])
            rows.append([f"{method.upper()}: parameters moved by the call, relative", moved, 0.0])
    write(problem, {}, {"rows": rows, "version": f"betty-ml {version('betty-ml')}"})


if __name__ == "__main__":
    match sys.argv[3]:
        case "defects":
            defects(Problem.of_command_line())
        case "cg" | "neumann":
            measure("betty-ml", implicit)
        case _:
            measure("betty-ml", unrolled)
