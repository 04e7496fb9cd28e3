"""hypertorch (package hypergrad): ``reverse_unroll`` over one graph, ``reverse`` over all states, two implicit solvers."""

import sys
from collections.abc import Callable

import torch.nn.functional as F
from hypergrad import CG, fixed_point, reverse, reverse_unroll  # pyright: ignore[reportMissingImports]
from hypergrad.diff_optimizers import GradientDescent, Momentum  # pyright: ignore[reportMissingImports]
from hypergradient_exchange import Problem, logits, measure, penalty
from torch import Tensor


def unrolled(problem: Problem) -> dict[str, Tensor]:
    (inputs, labels), hyper = problem.train, list(problem.hyperparameters())
    each = hyper[1].unbind()
    whole_graph = problem.method == "unrolled"

    def step(number: int) -> Momentum:
        ids = problem.order[number]

        def loss(params: list[Tensor], hyper: list[Tensor]) -> Tensor:
            losses = F.cross_entropy(logits(params, inputs[ids]), labels[ids], reduction="none")
            return (hyper[0][ids] * losses).mean()

        return Momentum(loss, lambda hyper: each[number] if whole_graph else hyper[1][number], problem.momentum)

    def asked(params: list[Tensor], hyper: list[Tensor]) -> Tensor:
        inputs, labels = problem.validation
        return F.cross_entropy(logits(params[: len(params) // 2], inputs), labels)

    params = [leaf.requires_grad_() for leaf in problem.parameters()]
    steps = [step(number) for number in range(len(problem.order))]
    if whole_graph:
        state = steps[0].get_opt_params(params)
        for update in steps:
            state = update(state, hyper)
        found = reverse_unroll(state, hyper, asked, set_grad=False)
    else:
        history = [steps[0].get_opt_params(params)]
        for update in steps:
            state = [leaf.detach().requires_grad_() for leaf in update(history[-1], hyper, create_graph=False)]
            history.append(state)
        found = reverse(history, hyper, steps, asked, set_grad=False)
    return dict(zip(("example_weights", "learning_rate"), found, strict=True))


def implicit(problem: Problem) -> dict[str, Tensor]:
    inputs, labels = problem.train
    hyper = [problem.log_l2.clone().requires_grad_()]
    solver: Callable = CG if problem.method == "cg" else fixed_point

    def objective(params: list[Tensor], hyper: list[Tensor]) -> Tensor:
        return F.cross_entropy(logits(params, inputs), labels) + penalty(params[0], hyper[0])

    def asked(params: list[Tensor], hyper: list[Tensor]) -> Tensor:
        return F.cross_entropy(logits(params, problem.validation[0]), problem.validation[1])

    descent = GradientDescent(objective, problem.step)
    (found,) = solver(problem.parameters(), hyper, problem.terms, descent, asked, set_grad=False)
    return {"log_l2": found}


if __name__ == "__main__":
    measure("hypergrad", unrolled if sys.argv[3] in ("unrolled", "states") else implicit)
