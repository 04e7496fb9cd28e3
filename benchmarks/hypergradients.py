"""Hypergradients: right against autograd through the whole run and against training again, and how wrong the short cuts are.

    python benchmarks/hypergradients.py [--quick]

A0  digits, MLP 64-16-10 with tanh, 64 steps, float64: replay against a plain loop of torch that autograd reverses, and against
    central differences of that loop, the smallest error over h; by example weights, learning rates, and the start.
A1  state beside the parameters: an outcome in evaluation mode depends on the running statistics of batch normalisation, which
    autograd does not follow; and dropout, whose masks must be drawn again. Both against central differences.
A2  implicit differentiation: logistic regression with a log-coefficient of L2 for each of 64 pixels, against dense linear
    algebra; and the fixed point of AdamW, against unrolling.
A3  truncation to the last K of 100 steps: cosine by example weights, and share of d/d log(learning rate) that is left.
B   one step with first-order passes: the Hessian product with the same dropout masks on both sides of the difference and with
    fresh ones, and Adam's derivative with and without bias corrections early in training.

Thresholds were fixed before the measurement.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tasks import digits_data, mlp, seeded
from torch import Tensor, nn

from retrograd import Classification, FirstOrder, FixedPoint, Outcome, Trajectory, Unrolled, hypergradient, record
from retrograd.adjoint import Notes
from retrograd.errors import UntrustedGradient
from retrograd.params import Params

STEPS, BATCH = 64, 32
SIZES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
NAMES = ("example_weights", "learning_rate", "initial_params")
SHORT = (1, 5, 10, 25, 50)
TARGETS = {
    "a0_replay_vs_autograd": ["<=", 1e-12],
    "a0_replay_vs_differences": ["<=", 1e-6],
    "a1_batchnorm_vs_differences": ["<=", 1e-6],
    "a1_dropout_vs_differences": ["<=", 1e-6],
    "a2_gradient_norm": ["<=", 1e-10],
    "a2_conjugate_gradients_20_error": ["<=", 1e-3],
    "a2_neumann_1000_error": ["<=", 1e-3],
    "a2_adamw_meta_error": ["<=", 1e-3],
    "a3_last_10_cosine": [">=", 0.3],
    "a3_last_10_cosine_most": ["<=", 0.6],
    "a3_last_50_cosine": [">=", 0.85],
    "a3_warned": [">=", 1.0],
    "b_same_masks_cosine": [">=", 0.999],
    "b_fresh_masks_cosine": ["<=", 0.1],
    "b_adam_first_order_error": ["<=", 1e-4],
}


def doubles(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return data[0].double(), data[1]


TRAIN, HELD_OUT = map(doubles, digits_data(train=512, queries=200))
OUTCOME = Outcome(lambda model: F.cross_entropy(model(HELD_OUT[0]), HELD_OUT[1]))


def network(seed: int = 0) -> nn.Module:
    return seeded(seed, lambda: mlp(64, 16, 10, activation=nn.Tanh)).double()


def order(steps: int, seed: int) -> Tensor:
    return torch.randint(len(TRAIN[0]), (steps, BATCH), generator=torch.Generator().manual_seed(seed))


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def normal(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


def quietly(run: Trajectory, wrt: Any, method: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedGradient)
        return hypergradient(run, OUTCOME, wrt, method=method, **options)


def smallest_error(slope: float, value: Callable[[float], float]) -> float:
    """Of central differences, over all step lengths: the bottom of the V."""
    return min(abs((value(h) - value(-h)) / (2 * h) - slope) / abs(slope) for h in SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# A0


@dataclass
class Inputs:
    """What A0 differentiates by."""

    weights: Tensor
    rates: Tensor
    start: Params


def plain_training(rule: str, batches: Tensor, inputs: Inputs, graph: bool) -> Tensor:
    """Train in plain torch and return the outcome; nothing here is the library's."""
    params = inputs.start
    first = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    second = dict(first)

    def logits(params: Params, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(pixels @ params["0.weight"].T + params["0.bias"])
        return hidden @ params["2.weight"].T + params["2.bias"]

    for step, ids in enumerate(batches):
        if not graph:
            params = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        losses = F.cross_entropy(logits(params, TRAIN[0][ids]), TRAIN[1][ids], reduction="none")
        loss = (inputs.weights[ids] * losses).sum() / len(ids)
        found = torch.autograd.grad(loss, list(params.values()), create_graph=graph)
        grads = dict(zip(params, found, strict=True))
        rate, count = inputs.rates[step], step + 1
        if rule == "momentum":
            first = {name: 0.9 * first[name] + grads[name] for name in params}
            params = {name: leaf - rate * first[name] for name, leaf in params.items()}
            continue
        first = {name: 0.9 * first[name] + (1 - 0.9) * grads[name] for name in params}
        second = {name: 0.999 * second[name] + (1 - 0.999) * grads[name] ** 2 for name in params}
        new = {}
        for name, leaf in params.items():
            square = second[name] / (1 - 0.999**count)  # exactly 0 where a pixel was black in all images: no derivative
            root = torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
            new[name] = leaf * (1 - rate * 0.1) - rate * first[name] / (1 - 0.9**count) / (root + 1e-8)
        params = new
    return F.cross_entropy(logits(params, HELD_OUT[0]), HELD_OUT[1])


def exactness(rule: str, seed: int) -> dict[str, float]:
    batches = order(STEPS, seed)
    run = record(network(seed), TRAIN, Classification(), optimizer={"momentum": momentum, "adamw": adamw}[rule], order=batches)
    rate = float(run.records[0].hyper[0]["learning_rate"])
    at = Inputs(
        torch.ones(len(TRAIN[0]), dtype=torch.float64).requires_grad_(),
        torch.full((STEPS,), rate, dtype=torch.float64).requires_grad_(),
        {name: leaf.detach().clone().requires_grad_() for name, leaf in network(seed).named_parameters()},
    )
    outcome = plain_training(rule, batches, at, graph=True)
    found = torch.autograd.grad(outcome, [at.weights, at.rates, *at.start.values()])
    weights, rates, start = found[0], found[1], dict(zip(at.start, found[2:], strict=True))
    ours = hypergradient(run, OUTCOME, NAMES, per_step=True)
    total = hypergradient(run, OUTCOME, "learning_rate")["learning_rate"][0]
    flat = torch.cat([leaf.flatten() for leaf in start.values()])
    result = {
        "weights_vs_autograd": relative(ours["example_weights"][0], weights),
        "rate_per_step_vs_autograd": relative(ours["learning_rate"][0, :, 0], rates),
        "rate_total_vs_autograd": relative(total, rates.sum()[None]),
        "start_vs_autograd": relative(ours.vector("initial_params")[0], flat),
    }
    moves = {
        "weights": (ours["example_weights"][0], normal(len(TRAIN[0]), 1)),
        "rate_per_step": (ours["learning_rate"][0, :, 0], rate * normal(STEPS, 2)),
        "rate_total": (total, torch.full((1,), rate, dtype=torch.float64)),
        "start": (ours.vector("initial_params")[0], 0.1 * normal(len(flat), 3)),
    }
    for name, (slope, move) in moves.items():

        def value(h: float, name: str = name, move: Tensor = move) -> float:
            moved = Inputs(at.weights.detach(), at.rates.detach(), {key: leaf.detach() for key, leaf in at.start.items()})
            if name == "weights":
                moved.weights = moved.weights + h * move
            elif name == "start":
                parts = move.split([leaf.numel() for leaf in moved.start.values()])
                both = zip(moved.start.items(), parts, strict=True)
                moved.start = {key: leaf + h * part.view_as(leaf) for (key, leaf), part in both}
            else:
                moved.rates = moved.rates + h * move
            return plain_training(rule, batches, moved, graph=False).item()

        result[f"{name}_vs_differences"] = smallest_error((slope @ move).item(), value)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# A1


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10)).double()


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 10)).double()


def plainly_trained(batches: Tensor, weights: Tensor) -> float:
    """Outcome of an ordinary loop with torch's own batch normalisation and optimizer."""
    model = seeded(0, normalised)
    optimizer = momentum(model.parameters())
    for ids in batches:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(TRAIN[0][ids]), TRAIN[1][ids], reduction="none")
        ((weights[ids] * losses).sum() / len(ids)).backward()
        optimizer.step()
    with torch.no_grad():
        return OUTCOME.function(model.eval()).item()


def state() -> dict[str, float]:
    batches, move = order(STEPS, 0), normal(len(TRAIN[0]), 1)
    run = record(seeded(0, normalised), TRAIN, Classification(), optimizer=momentum, order=batches)
    ours = hypergradient(run, OUTCOME, "example_weights")["example_weights"][0]
    cotangents = OUTCOME.gradients(run, run.final_state)
    blind = replace(cotangents, buffers={name: torch.zeros_like(leaf) for name, leaf in cotangents.buffers.items()})
    naive = torch.zeros_like(ours)
    for inputs, _, pullback in Unrolled().sweep(run, blind, Notes()):
        naive.index_add_(0, inputs.example_ids, pullback.scores[0])
    slope = (ours @ move).item()
    result = {
        "batchnorm_vs_differences": smallest_error(slope, lambda h: plainly_trained(batches, 1 + h * move)),
        "naive_error": abs((naive @ move).item() - slope) / abs(slope),
        "naive_distance": relative(naive, ours),
        "naive_cosine": torch.cosine_similarity(naive, ours, dim=0).item(),
    }
    again = record(seeded(0, dropped), TRAIN, Classification(), optimizer=momentum, order=batches)
    slope = (hypergradient(again, OUTCOME, "example_weights")["example_weights"][0] @ move).item()

    def value(h: float) -> float:
        moved = again.rerun(weights=1 + h * move)
        return OUTCOME.values(moved.update_map, moved.final_state).item()

    return result | {"dropout_vs_differences": smallest_error(slope, value)}


# ---------------------------------------------------------------------------------------------------------------------
# A2


class Penalty(nn.Module):
    """Logarithms of the coefficients of L2, one for each pixel."""

    def __init__(self, level: float):
        super().__init__()
        self.log = nn.Parameter(torch.full((64,), level, dtype=torch.float64).log())

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * (self.log.exp() * weight.square().sum(0)).sum()


class Penalised:
    """Cross-entropy and the penalty."""

    def losses(self, model: Any, batch: Any, meta: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") + meta(model.weight)

    def measurements(self, model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def logistic_run(optimizer: Any, steps: int, level: float) -> Trajectory:
    model = nn.Linear(64, 10, bias=False).double()
    nn.init.zeros_(model.weight)
    everything = torch.arange(len(TRAIN[0])).expand(steps, -1)
    return record(model, TRAIN, Penalised(), optimizer=optimizer, order=everything, meta=Penalty(level))


def implicit() -> dict[str, float]:
    level = 6.5e-3
    run = logistic_run(lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.85), 400, level)
    at = run.final_state.params["weight"].detach().flatten().requires_grad_()
    log = run.update_map.meta["log"].detach().clone().requires_grad_()

    def loss(at: Tensor, log: Tensor) -> Tensor:
        weight = at.view(10, 64)
        return F.cross_entropy(TRAIN[0] @ weight.T, TRAIN[1]) + 0.5 * (log.exp() * weight.square().sum(0)).sum()

    hessian = torch.autograd.functional.hessian(lambda at: loss(at, log.detach()), at.detach(), vectorize=True)
    assert isinstance(hessian, Tensor)
    values = torch.linalg.eigvalsh(hessian)
    (grad,) = torch.autograd.grad(loss(at, log), at, create_graph=True)
    (outward,) = torch.autograd.grad(F.cross_entropy(HELD_OUT[0] @ at.view(10, 64).T, HELD_OUT[1]), at)
    true = -torch.autograd.grad(grad, log, torch.linalg.solve(hessian, outward))[0]
    result = {"gradient_norm": grad.norm().item(), "condition": (values[-1] / values[0]).item()}
    long_step = 2.0 / (1 - 0.85)  # of the optimizer; the Neumann series needs one of 1 / the largest eigenvalue
    step = 1 / (values[-1].item() * long_step)
    methods = {
        "identity": FixedPoint("identity"),
        **{f"conjugate_gradients_{k}": FixedPoint("conjugate_gradients", iterations=k, tolerance=1e-14) for k in (5, 10, 20)},
        **{f"neumann_{k}": FixedPoint("neumann", iterations=k, step=step) for k in (20, 100, 1000)},
        **{f"nystrom_{k}": FixedPoint("nystrom", rank=k, shift=level) for k in (50, 200)},
    }
    for name, method in methods.items():
        found = quietly(run, "meta", method)
        own = found["meta"]["log"][0]
        result[f"{name}_error"] = relative(own, true)
        result[f"{name}_cosine"] = torch.cosine_similarity(own, true, dim=0).item()
        result[f"{name}_residual"] = found.notes["solver_residual"]
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.05}
    settled = logistic_run(lambda p: torch.optim.AdamW(p, **options), 2000, level)
    names = ("meta", "weight_decay", "example_weights")
    fixed, unrolled = quietly(settled, names, FixedPoint()), quietly(settled, names, Unrolled())
    result["adamw_drift"] = fixed.notes["drift"]
    for name in names:
        result[f"adamw_{name}_error"] = relative(fixed.vector(name)[0], unrolled.vector(name)[0])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# A3


def truncation(seeds: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    warned = 1.0
    for seed in range(seeds):
        run = record(network(seed), TRAIN, Classification(), optimizer=momentum, order=order(100, seed))
        full = hypergradient(run, OUTCOME, ("example_weights", "learning_rate"))
        for last in SHORT:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                part = hypergradient(run, OUTCOME, ("example_weights", "learning_rate"), method=Unrolled(last=last))
            said = any(issubclass(one.category, UntrustedGradient) and "only the last" in str(one.message) for one in caught)
            warned = min(warned, float(said))
            share = (part["learning_rate"] / full["learning_rate"]).item()
            for name, value in (
                (f"last_{last}_cosine", part.cosine(full, "example_weights").item()),
                (f"last_{last}_rate", share),
            ):
                sums[name] = sums.get(name, 0.0) + value / seeds
    return {**sums, "last_10_cosine_most": sums["last_10_cosine"], "warned": warned}


# ---------------------------------------------------------------------------------------------------------------------
# B


def one_step() -> dict[str, float]:
    run = record(seeded(0, dropped), TRAIN, Classification(), optimizer=momentum, order=order(STEPS, 0))
    step = len(run) - 1
    before, inputs, cotangents = run.state(step), run.inputs(step), OUTCOME.gradients(run, run.final_state)
    radius = torch.finfo(torch.float64).eps ** (1 / 3)

    def product(params: Params) -> Tensor:  # momentum and rate leave λ itself: what is added to it is H γ
        return torch.cat([(leaf - cotangents.params[name]).flatten() for name, leaf in params.items()])

    true = product(run.update_map.pullback(before, inputs, cotangents).costates.params)
    ours = product(run.update_map.pullback_by_differences(before, inputs, cotangents, radius).costates.params)
    gamma = {name: -0.05 * leaf[0] for name, leaf in cotangents.params.items()}
    length = radius / torch.cat([leaf.flatten() for leaf in gamma.values()]).norm()
    fresh = []
    for seed in range(32):
        sides = []
        for sign in (1, -1):
            moved = replace(before, params={n: leaf + sign * length * gamma[n] for n, leaf in before.params.items()})
            grads = run.update_map.graph(moved, replace(inputs, seed=1000 + 2 * seed + sign)).grads
            sides.append(torch.cat([grads[name].detach().flatten() for name in before.params]))
        fresh.append(torch.cosine_similarity((sides[0] - sides[1]) / (2 * length), true, dim=0).item())
    early = record(network(), TRAIN, Classification(), optimizer=adamw, order=order(8, 0))
    found = quietly(early, "example_weights", FirstOrder())["example_weights"][0]
    exact = quietly(early, "example_weights", Unrolled(last=1))["example_weights"][0]
    at, last, out = early.state(7), early.inputs(7), OUTCOME.gradients(early, early.final_state)
    uncorrected = torch.zeros_like(exact)
    settled = replace(last, hyper=tuple({**own, "step": 1e9} for own in last.hyper))
    uncorrected.index_add_(0, last.example_ids, early.update_map.pullback(at, settled, out).scores[0])
    return {
        "same_masks_cosine": torch.cosine_similarity(ours, true, dim=0).item(),
        "fresh_masks_cosine": abs(statistics.mean(fresh)),
        "fresh_masks_cosine_typical": statistics.median(map(abs, fresh)),
        "adam_first_order_error": relative(found, exact),
        "adam_uncorrected_error": relative(uncorrected, exact),
        "adam_uncorrected_cosine": torch.cosine_similarity(uncorrected, exact, dim=0).item(),
    }


def meets(value: float, sign: str, bound: float) -> bool:
    return value <= bound if sign == "<=" else value >= bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed each; within a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    parts: list[tuple[str, Callable[[], dict[str, float]]]] = [("a1", state), ("a2", implicit)]
    parts += [("a3", lambda: truncation(1 if quick else 3)), ("b", one_step)]
    for rule in ("momentum", "adamw"):
        for seed in range(1 if quick else 3):
            found = exactness(rule, seed)
            for name, value in found.items():
                figures[f"a0_{rule}_{name}"] = max(value, figures.get(f"a0_{rule}_{name}", 0.0))
    for kind in ("autograd", "differences"):
        worst = [value for name, value in figures.items() if name.endswith(f"_vs_{kind}")]
        figures[f"a0_replay_vs_{kind}"] = max(worst)
    for label, measure in parts:
        start = time.process_time()
        figures |= {f"{label}_{name}": value for name, value in measure().items()}
        figures[f"{label}_seconds"] = time.process_time() - start
    print(f"{'':<44}{'measured':>12}   target")
    for name, value in figures.items():
        sign, bound = TARGETS.get(name, ("", 0.0))
        verdict = "" if not sign else f"{sign} {bound:g}" + ("" if meets(value, str(sign), float(bound)) else "   MISSED")
        print(f"{name:<44}{value:>12.3g}   {verdict}".rstrip())
    met = all(meets(figures[name], str(sign), float(bound)) for name, (sign, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "hypergradients", "figures": figures, "targets": TARGETS, "met": met}))


if __name__ == "__main__":
    main()
