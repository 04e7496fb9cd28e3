"""The optimizers for games as their papers write them: complex numbers are complex, slow weights are weights.

Importing this adds them to ``unrolled_autograd``, under the functions that make the real ones.
"""

import torch
from torch import Tensor

from retrograd.optim import AggregatedSGD, ComplexAdam, ComplexSGD, Lookahead, OptimisticAdam, OptimisticSGD
from tests.reference import unrolled_autograd as reference
from tests.reference.unrolled_autograd import State, adam, root, sgd

STEPS, SHARE = 3, 0.6


def turned(slots: State, name: str, beta: complex, g: Tensor) -> Tensor:
    return beta * torch.complex(slots[f"{name}_real"], slots[f"{name}_imaginary"]) - g


def complex_sgd(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    mu = turned(slots, "velocity", o["beta"], g + o.get("weight_decay", 0.0) * theta)
    return theta + (o["lr"] * mu).real, {"velocity_real": mu.real, "velocity_imaginary": mu.imag}


def complex_adam(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    beta1, beta2 = o["betas"]
    g = g + o.get("weight_decay", 0.0) * theta
    mu = turned(slots, "first_moment", beta1, g)
    v = beta2 * slots["second_moment"] + (1 - beta2) * g**2
    n = (1 / (1 - beta1)).real if o.get("normalise") == "dc" else 1.0
    theta = theta + o["lr"] / n * mu.real / (root(v / (1 - beta2**t)) + o["eps"])
    return theta, {"first_moment_real": mu.real, "first_moment_imaginary": mu.imag, "second_moment": v}


def aggregated(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    g = g + o.get("weight_decay", 0.0) * theta
    new = {f"velocity_{k}": damping * slots[f"velocity_{k}"] - g for k, damping in enumerate(o["dampings"])}
    return theta + o["lr"] * sum(new.values()) / len(new), new


def optimistic(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    a, b = o["lr"], o["lr"] * o.get("optimism", 1.0)
    g = g + o.get("weight_decay", 0.0) * theta
    return theta - (a + b) * g + b * (g if t == 1 else slots["previous_gradient"]), {"previous_gradient": g}


def optimistic_adam(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    g = g + o.get("weight_decay", 0.0) * theta
    still, new = adam(torch.zeros_like(theta), slots, g, {**o, "lr": 1.0, "weight_decay": 0.0}, t)
    d, rho = -still, o.get("optimism", 1.0)
    before = d if t == 1 else slots["previous_direction"]
    return theta - o["lr"] * ((1 + rho) * d - rho * before), {**new, "previous_direction": d}


def lookahead(inner):
    def step(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
        slow = theta - slots["drift"]
        fast, new = inner(theta, slots, g, o, t)
        if t % STEPS == 0:
            slow = fast = slow + SHARE * (fast - slow)
        return fast, {**new, "drift": fast - slow}

    return step


def lookahead_sgd(groups):
    return Lookahead(torch.optim.SGD(groups, foreach=False), k=STEPS, alpha=SHARE)


def lookahead_adam(groups):
    return Lookahead(torch.optim.Adam(groups, foreach=False), k=STEPS, alpha=SHARE)


reference.OPTIMIZERS |= {
    ComplexSGD: complex_sgd,
    ComplexAdam: complex_adam,
    AggregatedSGD: aggregated,
    OptimisticSGD: optimistic,
    OptimisticAdam: optimistic_adam,
    lookahead_sgd: lookahead(sgd),
    lookahead_adam: lookahead(adam),
}
_MOMENTS = ("first_moment", "second_moment")
reference.SLOTS |= {
    ComplexSGD: ("velocity_real", "velocity_imaginary"),
    ComplexAdam: ("first_moment_real", "first_moment_imaginary", "second_moment"),
    AggregatedSGD: ("velocity_0", "velocity_1", "velocity_2"),
    OptimisticSGD: ("previous_gradient",),
    OptimisticAdam: (*_MOMENTS, "previous_direction"),
    lookahead_sgd: ("velocity", "drift"),
    lookahead_adam: (*_MOMENTS, "drift"),
}
