"""hypergrad (moskomule's): two implicit solvers. The method "defects" holds its conjugate gradients against a textbook's."""

import sys
from importlib.metadata import version

import torch.nn.functional as F
from hypergrad.approx_hypergrad import conjugate_gradient, neumann  # pyright: ignore[reportMissingImports]
from hypergradient_exchange import Problem, distance, logits, measure, penalty, textbook_solution, write
from torch import Tensor


def implicit(problem: Problem, terms: int | None = None, rate: float = 1.0) -> dict[str, Tensor]:
    terms = problem.terms if terms is None else terms

    def lower(weight: tuple[Tensor], log_l2: tuple[Tensor]) -> Tensor:
        return F.cross_entropy(logits(weight, problem.train[0]), problem.train[1]) + penalty(weight[0], log_l2[0])

    def upper(weight: tuple[Tensor], log_l2: tuple[Tensor]) -> Tensor:
        return F.cross_entropy(logits(weight, problem.validation[0]), problem.validation[1])

    at = tuple(problem.parameters()), (problem.log_l2,)
    if problem.method == "neumann":
        (found,) = neumann(lower, upper, *at, terms, problem.step)
    else:
        (found,) = conjugate_gradient(lower, upper, *at, terms, rate)
    return {"log_l2": found}


def defects(problem: Problem) -> None:
    exact = textbook_solution(problem, 1000)
    rows = [
        [
            f"CG, lr = {rate:g}, {terms} iterations: relative error",
            distance(implicit(problem, terms, rate)["log_l2"], exact),
            distance(textbook_solution(problem, terms), exact),
        ]
        for rate, terms in ((1.0, 3), (1.0, 10), (1.0, 20), (0.1, 10))
    ]
    write(problem, {}, {"rows": rows, "version": f"hypergrad {version('hypergrad')}"})


if __name__ == "__main__":
    match sys.argv[3]:
        case "defects":
            defects(Problem.of_command_line())
        case _:
            measure("hypergrad", implicit)
