"""BOAT, which unrolls by higher: NGD with RAD for the training, NGD with CG or NS at the optimum.

Learning rates are the torch optimizer's, which it does not differentiate. The method "defects" asks what becomes of NaN.
"""

import itertools
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boat_torch  # pyright: ignore[reportMissingImports]
import torch
import torch.nn.functional as F
from hypergradient_exchange import Problem, measure, penalty, write
from torch import Tensor, nn

CONFIGURATION: dict[str, Any] = {
    "fo_op": None,
    "gm_op": ["NGD"],
    "return_grad": True,
    "device": "cpu",
    "accumulate_grad": False,
    "copy_last_param": False,
    "fo_ol_batch_input": False,
    "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
    "RGT": {"truncate_iter": 0},
}


class Hyperparameter(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)


def training_loss(feed: dict[str, Any], upper: Any, lower: Any) -> Tensor:
    inputs, labels = feed["data"]
    ids = next(feed["batches"])
    return (upper.value[ids] * F.cross_entropy(lower(inputs[ids]), labels[ids], reduction="none")).mean()


def penalised_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    inputs, labels = feed["data"]
    (weight,) = lower.parameters() if params is None else params
    return F.cross_entropy(F.linear(inputs, weight), labels) + penalty(weight, upper.value)


def validation_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    inputs, labels = feed["data"]
    return F.cross_entropy(lower(inputs) if params is None else lower(inputs, params=params), labels)


def run(problem: Problem, loss: str, value: Tensor, steps: int, rate: float, momentum: float, operation: str) -> Tensor:
    upper, lower = Hyperparameter(value), problem.model()
    with tempfile.TemporaryDirectory() as folder:
        configuration = CONFIGURATION | {
            "na_op": [operation],
            "lower_iters": steps,
            "CG": {"k": problem.terms if operation != "RAD" else 0, "tolerance": 1e-10},
            "lower_level_model": lower,
            "upper_level_model": upper,
            "lower_level_var": list(lower.parameters()),
            "upper_level_var": list(upper.parameters()),
            "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=rate, momentum=momentum),
            "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
            "loss_log_path": str(Path(folder) / "losses.json"),
        }
        losses = {
            "lower_level_loss": {"function": f"__main__.{loss}"},
            "upper_level_loss": {"function": "__main__.validation_loss"},
        }
        bilevel = boat_torch.Problem(configuration, losses)
        bilevel.build_ll_solver()
        bilevel.build_ul_solver()
        feed: dict[str, Any] = {"data": problem.train}
        if loss == "training_loss":
            feed["batches"] = itertools.cycle(problem.order)
        (found,), _ = bilevel.run_iter(feed, {"data": problem.validation}, current_iter=0)
    return found


def unrolled(problem: Problem) -> dict[str, Tensor]:
    weights = problem.hyperparameters()[0].detach()
    return {
        "example_weights": run(problem, "training_loss", weights, len(problem.order), problem.rate, problem.momentum, "RAD")
    }


def implicit(problem: Problem) -> dict[str, Tensor]:
    operation = {"cg": "CG", "neumann": "NS"}[problem.method]
    return {"log_l2": run(problem, "penalised_loss", problem.log_l2.clone(), 1, problem.step, 0.0, operation)}


def defects(problem: Problem) -> None:
    """Ask for the gradient of two terms, of which one is √0."""
    zero, one = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    value = (zero.square().sum().sqrt() + one.sum()) * 1.0
    found, _ = boat_torch.utils.op_utils.grad_unused_zero(value, [zero, one])
    rows = [["entries that are NaN, in the gradient of √0", found.isnan().sum().item(), 2]]
    write(problem, {}, {"rows": rows, "version": f"boat-torch {version('boat-torch')}"})


if __name__ == "__main__":
    match sys.argv[3]:
        case "defects":
            defects(Problem.of_command_line())
        case method:
            measure("boat-torch higher", unrolled if method == "unrolled" else implicit)
