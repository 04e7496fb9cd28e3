"""TorchOpt: the training in one graph by its functional SGD, and implicit differentiation with its two linear solvers.

The learning rate is a schedule that reads the differentiated one of each step. ``rtol=0`` has conjugate gradients take all
their iterations. The method "defects" counts the terms of its two Neumann series.
"""

import sys

import torch
import torch.nn.functional as F
import torchopt  # pyright: ignore[reportMissingImports]
from hypergradient_exchange import Problem, logits, measure, penalty, write
from torch import Tensor


def unrolled(problem: Problem) -> dict[str, Tensor]:
    (inputs, labels), (weights, rates) = problem.train, problem.hyperparameters()
    each = rates.unbind()
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=lambda count: each[int(count)], momentum=problem.momentum))
    params = tuple(leaf.requires_grad_() for leaf in problem.parameters())
    for ids in problem.order:
        losses = F.cross_entropy(logits(params, inputs[ids]), labels[ids], reduction="none")
        params = optimizer.step((weights[ids] * losses).mean(), params)
    inputs, labels = problem.validation
    by_weights, by_rates = torch.autograd.grad(F.cross_entropy(logits(params, inputs), labels), [weights, rates])
    return {"example_weights": by_weights, "learning_rate": by_rates}


def implicit(problem: Problem) -> dict[str, Tensor]:
    (inputs, labels), (optimum,) = problem.train, problem.parameters()
    log_l2 = problem.log_l2.clone().requires_grad_()
    if problem.method == "cg":
        solve = torchopt.linear_solve.solve_cg(maxiter=problem.terms, rtol=0.0)
    else:
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=problem.terms, alpha=problem.step)

    def objective(weight: Tensor, log_l2: Tensor) -> Tensor:
        return F.cross_entropy(logits([weight], inputs), labels) + penalty(weight, log_l2)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=1, solve=solve)
    def solution(weight: Tensor, log_l2: Tensor) -> Tensor:
        return weight

    weight = solution(optimum, log_l2)
    asked = F.cross_entropy(logits([weight], problem.validation[0]), problem.validation[1])
    return {"log_l2": torch.autograd.grad(asked, log_l2)[0]}


def defects(problem: Problem) -> None:
    """Count terms Σ_{j<n} (I − αA)^j α of both series at ``maxiter=3``."""
    generator = torch.Generator().manual_seed(0)
    factor, right = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    matrix, right, step = factor @ factor.T / 8 + torch.eye(8).double(), right[0], 0.2
    by_products = torchopt.linalg.ns(lambda vector: matrix @ vector, right, maxiter=3, alpha=step)
    by_inverse = torchopt.linalg.ns_inv(matrix, maxiter=3, alpha=step) @ right
    shrink = torch.eye(8).double() - step * matrix
    powers = [step * torch.matrix_power(shrink, j) @ right for j in range(6)]
    series = [sum(powers[:n], right * 0) for n in range(6)]

    def terms(found: Tensor) -> int:
        return min(range(6), key=lambda n: (found - series[n]).norm().item())

    rows = [
        ["Neumann terms at maxiter=3, by products", terms(by_products), 3],
        ["Neumann terms at maxiter=3, by ns_inv", terms(by_inverse), 3],
    ]
    write(problem, {}, {"rows": rows, "version": f"torchopt {torchopt.__version__}"})


if __name__ == "__main__":
    match sys.argv[3]:
        case "defects":
            defects(Problem.of_command_line())
        case method:
            measure("torchopt", unrolled if method == "unrolled" else implicit)
