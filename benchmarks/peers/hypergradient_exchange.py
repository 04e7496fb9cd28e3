"""What a hypergradient script gets and gives back: arrays in .npz files, which numpy reads without pickle.

It runs in the environment of a peer, where there is torch, numpy and the peer, but no retrograd.

    python benchmarks/peers/hypergradient_PEER.py PROBLEM RESULT METHOD

PROBLEM was written by `benchmarks/hypergradient_peers.py`, in the precision that the answer is asked in. It is one of two:

unrolled    an MLP 64-32-10 with tanh, trained by SGD with momentum over recorded batches, each step on the mean of w_i ℓ_i over
            its batch. Asked: the derivative of the mean validation loss by every w_i and by the learning rate of every step.
implicit    logistic regression at its optimum for 64 penalties ½ exp(ρ_j) Σ_k W_kj². Asked: the same by ρ.

RESULT gets the derivatives by name, seconds, bytes and versions.
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from exchange import peak_bytes
from torch import Tensor, nn

REPEATS = 3
WARM_UP = 4  # steps of the run, and terms of the series, of the call that is not measured


@dataclass
class Problem:
    """What the command line names: the method, and the arrays of the problem."""

    method: str
    arrays: dict[str, Tensor]
    result: Path = field(default=Path("."))

    @staticmethod
    def of_command_line() -> "Problem":
        torch.set_num_threads(1)
        problem, result, method = sys.argv[1:]
        with np.load(problem) as arrays:
            return Problem(method, {name: torch.from_numpy(arrays[name]) for name in arrays.files}, Path(result))

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.arrays["train_inputs"], self.arrays["train_labels"]

    @property
    def validation(self) -> tuple[Tensor, Tensor]:
        return self.arrays["validation_inputs"], self.arrays["validation_labels"]

    @property
    def order(self) -> Tensor:
        """Ids of each step's batch, ``[T, B]``."""
        return self.arrays["order"]

    @property
    def rate(self) -> float:
        return float(self.arrays["rate"])

    @property
    def momentum(self) -> float:
        return float(self.arrays["momentum"])

    @property
    def log_l2(self) -> Tensor:
        """ρ, ``[64]``."""
        return self.arrays["log_l2"]

    @property
    def step(self) -> float:
        """1 / the largest eigenvalue of the Hessian."""
        return float(self.arrays["step"])

    @property
    def terms(self) -> int:
        """Iterations of conjugate gradients, or terms of the Neumann series."""
        return int(self.arrays["neumann_terms" if self.method.startswith("neumann") else "cg_terms"])

    def parameters(self) -> list[Tensor]:
        """Return the initial parameters of the MLP, or the optimum of the logistic regression."""
        return [self.arrays[name].clone() for name in sorted(self.arrays) if name.startswith("parameter")]

    def model(self) -> nn.Module:
        first, *others = self.parameters()
        layers: list[nn.Module] = [nn.Linear(first.shape[1], first.shape[0], bias=bool(others))]
        if others:
            layers += [nn.Tanh(), nn.Linear(others[1].shape[1], others[1].shape[0])]
        model = nn.Sequential(*layers).to(first.dtype)
        with torch.no_grad():
            for leaf, value in zip(model.parameters(), self.parameters(), strict=True):
                leaf.copy_(value)
        return model

    def hyperparameters(self) -> tuple[Tensor, Tensor]:
        """Return weights w and learning rates of the steps, as leaves."""
        like = self.train[0]
        weights, rates = like.new_ones(len(like)), like.new_full((len(self.order),), self.rate)
        return weights.requires_grad_(), rates.requires_grad_()

    def shortened(self) -> "Problem":
        """Return the same problem with little work to do."""
        small = {name: torch.tensor(WARM_UP) for name in ("cg_terms", "neumann_terms") if name in self.arrays}
        if "order" in self.arrays:
            small["order"] = self.order[:WARM_UP]
        return replace(self, arrays=self.arrays | small)


def logits(parameters: Any, inputs: Tensor) -> Tensor:
    """Evaluate the MLP, or the logistic regression if there is but one parameter."""
    first, *others = parameters
    if not others:
        return F.linear(inputs, first)
    return F.linear(torch.tanh(F.linear(inputs, first, others[0])), *others[1:])


def penalty(weight: Tensor, log_l2: Tensor) -> Tensor:
    return (log_l2.exp() * weight.square().sum(0)).sum() / 2


def textbook_solution(problem: Problem, iterations: int) -> Tensor:
    """Return the derivative by ρ by conjugate gradients as a textbook has them, to compare those of a peer with."""
    (inputs, labels), (weight,) = problem.train, problem.parameters()
    weight.requires_grad_()
    asked = F.cross_entropy(logits([weight], problem.validation[0]), problem.validation[1])
    (residual,) = torch.autograd.grad(asked, weight)
    objective = F.cross_entropy(logits([weight], inputs), labels) + penalty(weight, problem.log_l2)
    (gradient,) = torch.autograd.grad(objective, weight, create_graph=True)
    found, direction = torch.zeros_like(residual), residual
    for _ in range(iterations):
        (product,) = torch.autograd.grad(gradient, weight, direction, retain_graph=True)
        length = residual.square().sum() / (direction * product).sum()
        found, before, residual = found + length * direction, residual, residual - length * product
        direction = residual + direction * residual.square().sum() / before.square().sum()
        if residual.norm() < 1e-14:
            break
    return -(found * weight.detach() * problem.log_l2.exp()).sum(0)


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def resident_bytes() -> int:
    """Return the resident memory of this process; where Linux allows it, after giving back what is free and with a new peak."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return peak_bytes()
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")) * 1024


def measure(
    packages: str, hypergradient: Callable[[Problem], Mapping[str, Tensor]], figures: Callable[[], dict[str, Any]] = dict
) -> None:
    """Call ``hypergradient(problem)`` and write down what it gave; ``packages`` are those whose versions are noted.

    A short problem warms up. The next call is the one whose memory is measured: the peak of the process above what it held
    before. Then come three that are timed, of which the best counts, in seconds of the processor. What ``figures``
    returns in the end is written too.
    """
    problem = Problem.of_command_line()
    hypergradient(problem.shortened())
    gc.collect()
    before = resident_bytes()
    found = hypergradient(problem)
    size = peak_bytes() - before
    seconds = []
    for _ in range(REPEATS):
        gc.collect()
        began = time.process_time()
        found = hypergradient(problem)
        seconds.append(time.process_time() - began)
    about: dict[str, Any] = {"seconds": min(seconds), "bytes": size, **figures()}
    about["version"] = ", ".join(f"{name} {version(name)}" for name in [*packages.split(), "torch"])
    write(problem, found, about)


def write(problem: Problem, found: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {name: tensor.detach().double().numpy() for name, tensor in found.items()}
    np.savez(problem.result, about=json.dumps(about), **arrays)
