"""Does filtering the gradient lower the noise floor, and does that help on digits?

    python benchmarks/gradient_filter.py [--quick]

**Noisy quadratic** ½ θᵀHθ + z·θ with 20 eigenvalues of H from 0.1 to 10 (condition number 100), batches of 4 draws of z whose
mean has variance 1 in each direction, learning rate 0.05 for everyone. The floor is the mean of ½ θᵀHθ over the last quarter of
the steps. Two rows are what anyone would do instead at no cost: let the learning rate fall to zero, or average the iterates.

**Digits**, an MLP 64-64-64-10 with batches of 64. Learning rates are chosen on other seeds, by the test loss; the seeds that
are shown draw start and batches anew. Everyone gets the same number of steps, and SGD once more as many as the filter's time
would have paid for, with a learning rate chosen for that. How far m and the batch gradient are from the gradient of all
training data is measured along the filter's own path.

**Cost** is the median time of a step over that of SGD's, taken in turns in the same process.

Intervals are 95 %, Student's t over seeds; those of ratios are of logarithms. Fixed before the run: the floor of SGD is at
least five times the filter's; on digits the batch gradient's squared error is at least twice that of m, and the filter's test
accuracy is not more than two points below that of SGD with momentum at as many steps.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import t as student_t
from tasks import digits_data, mlp, seeded
from torch import Tensor, nn

from retrograd import Classification
from retrograd.optim import GradientFilter

TARGETS = {
    "floor_sgd_over_filter": [">=", 5.0],
    "digits_squared_error_batch_over_filter": [">=", 2.0],
    "digits_accuracy_filter_minus_momentum": [">=", -2.0],
}
EIGENVALUES = torch.logspace(-1, 1, 20, dtype=torch.float64)
TUNING_SEED = 1000


class Point(nn.Module):
    def __init__(self, start: Tensor):
        super().__init__()
        self.theta = nn.Parameter(start.clone())


def quadratic(model: Any, noise: Tensor) -> Tensor:
    return (EIGENVALUES * model.theta.square()).sum() / 2 + noise @ model.theta


Stepper = Callable[[Any], Tensor]


def plain(model: nn.Module, losses: Any, **options: Any) -> tuple[torch.optim.Optimizer, Stepper]:
    optimizer = torch.optim.SGD(model.parameters(), **options)

    def step(batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = losses(model, batch).mean()
        loss.backward()
        optimizer.step()
        return loss

    return optimizer, step


def filtered(model: nn.Module, losses: Any, **options: Any) -> tuple[torch.optim.Optimizer, Stepper]:
    optimizer = GradientFilter(model, losses, **options)
    return optimizer, optimizer.step


QUADRATIC = {
    "SGD": (plain, {"lr": 0.05}),
    "SGD, momentum .9": (plain, {"lr": 0.05, "momentum": 0.9}),
    "SGD, EMA .9 of gradients": (plain, {"lr": 0.05, "momentum": 0.9, "dampening": 0.9}),
    "SGD, lr falls to 0": (plain, {"lr": 0.05}),
    "SGD, iterates averaged": (plain, {"lr": 0.05}),
    "filter": (filtered, {"lr": 0.05}),
    "filter, self-tuned": (filtered, {"lr": None}),
}


def floor(name: str, seed: int, steps: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    model = Point(torch.randn(20, generator=draw, dtype=torch.float64))
    make, options = QUADRATIC[name]
    optimizer, step = make(model, quadratic, **options)
    found, total = [], torch.zeros(20, dtype=torch.float64)
    for number in range(steps):
        if name.endswith("falls to 0"):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - number / steps)
        step(2 * torch.randn(4, 20, generator=draw, dtype=torch.float64))  # the mean of four has variance 1
        point = model.theta.detach()
        if name.endswith("averaged"):  # the second half
            total += point if number >= steps // 2 else 0
            point = total / max(1, number + 1 - steps // 2)
        if number >= 3 * steps // 4:
            found.append(float((EIGENVALUES * point.square()).sum() / 2))
    return statistics.fmean(found)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


TRAIN, TEST = digits_data(1200, 597)
LOSSES = Classification().losses


def network(seed: int) -> nn.Module:
    return seeded(seed, lambda: mlp(64, 64, 64, 10))


def batches(seed: int, steps: int) -> list[Tensor]:
    draw, found = torch.Generator().manual_seed(seed), []
    while len(found) < steps:
        order = torch.randperm(len(TRAIN[0]), generator=draw)
        found += [order[start : start + 64] for start in range(0, len(order) - 63, 64)]
    return found[:steps]


def full_gradient(model: nn.Module) -> Tensor:
    found = torch.autograd.grad(LOSSES(model, TRAIN).mean(), list(model.parameters()))
    return torch.cat([leaf.flatten() for leaf in found])


def train(make: Any, options: dict[str, Any], seed: int, steps: int, errors: bool = False) -> dict[str, float]:
    """Train on digits; test loss and accuracy (per cent), training loss, and squared errors of m and the batch gradient."""
    model = network(seed)
    optimizer, step = make(model, LOSSES, **options)
    own, batch_own = 0.0, 0.0
    for number, ids in enumerate(batches(seed, steps)):
        batch = TRAIN[0][ids], TRAIN[1][ids]
        if errors and number >= 10 and number % 10 == 0:
            before, truth = copy.deepcopy(model), full_gradient(model)
            step(batch)
            mean = torch.cat([leaf.flatten() for leaf in optimizer.filtered_gradient().values()])
            seen = torch.autograd.grad(LOSSES(before, batch).mean(), list(before.parameters()))
            own += float((mean - truth).square().sum())
            batch_own += float((torch.cat([leaf.flatten() for leaf in seen]) - truth).square().sum())
        else:
            step(batch)
    with torch.no_grad():
        test, everything = LOSSES(model, TEST).mean(), LOSSES(model, TRAIN).mean()
        accuracy = 100 * (model(TEST[0]).argmax(1) == TEST[1]).double().mean()
    figures = {"test": float(test), "train": float(everything), "accuracy": float(accuracy)}
    return figures | ({"ratio": batch_own / own} if errors else {})


def chosen(make: Any, rates: tuple[float, ...], more: dict[str, Any], steps: int, seeds: int) -> dict[str, Any]:
    """The options with the best test loss on seeds that are not shown; a run that diverges is the worst."""

    def loss(rate: float) -> float:
        found = [train(make, {"lr": rate, **more}, TUNING_SEED + seed, steps)["test"] for seed in range(seeds)]
        return statistics.fmean(value if math.isfinite(value) else math.inf for value in found)

    return {"lr": rates[0] if len(rates) == 1 else min(rates, key=loss), **more}


def cost(sizes: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Median time of a step over that of plain SGD, for each variant of the filter."""
    ways: dict[str, Stepper] = {}
    for name, (make, options) in {
        "sgd": (plain, {"lr": 0.01}),
        "hessian": (filtered, {"lr": 0.01}),
        "difference": (filtered, {"lr": 0.01, "change": "difference"}),
        "each_example": (filtered, {"lr": 0.01, "parts": None}),
        "self_tuned": (filtered, {"lr": None}),
    }.items():
        ways[name] = make(seeded(0, lambda: mlp(*sizes)), LOSSES, **options)[1]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for ids in batches(0, rounds + 3):
        batch = TRAIN[0][ids], TRAIN[1][ids]
        for name, step in ways.items():
            begin = time.process_time()
            for _ in range(10 if name == "sgd" else 1):
                step(batch)
            times[name].append((time.process_time() - begin) / (10 if name == "sgd" else 1))
    medians = {name: statistics.median(found[3:]) for name, found in times.items()}  # the first steps import and allocate
    return {name: medians[name] / medians["sgd"] for name in ways if name != "sgd"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, steps and learning rates")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    figures: dict[str, float] = {}

    seeds, steps = (2, 800) if quick else (5, 1500)
    floors = {name: [floor(name, seed, steps) for seed in range(seeds)] for name in QUADRATIC}
    print(f"noisy quadratic, {steps} steps, {seeds} seeds{'floor':>21}{'SGD over this':>30}")
    for name, found in floors.items():
        mean, half = interval(found)
        logs = [math.log(sgd / own) for sgd, own in zip(floors["SGD"], found, strict=True)]
        middle, width = interval(logs)
        low, high = math.exp(middle - width), math.exp(middle + width)
        print(f"{name:<34}{mean:>16.4f} ± {half:<10.4f}{math.exp(middle):>12.2f} [{low:.2f}, {high:.2f}]", flush=True)
        key = name.lower().replace(", ", "_").replace(" ", "_").replace(".", "").replace("-", "_")
        figures |= {f"floor_{key}": mean, f"floor_sgd_over_{key}": math.exp(middle), f"floor_sgd_over_{key}_low": low}

    print("\ncost of a step, in steps of SGD")
    for label, sizes in (("64-64-64-10", (64, 64, 64, 10)), ("64-256-256-10", (64, 256, 256, 10))):
        ratios = cost(sizes, 10 if quick else 40)
        print(f"  MLP {label:<16}" + "".join(f"{name} {ratio:.1f}   " for name, ratio in ratios.items()), flush=True)
        figures |= {f"cost_{label.replace('-', '_')}_{name}": ratio for name, ratio in ratios.items()}

    seeds, tuning, steps = (2, 1, 90) if quick else (5, 2, 180)
    longer = round(steps * figures["cost_64_64_64_10_hessian"])
    momentum = {"momentum": 0.9}
    rates, slow = ((0.3,), (0.1,)) if quick else ((0.1, 0.3, 0.5, 0.8), (0.01, 0.03, 0.1, 0.2))
    rows = {
        "SGD": (plain, chosen(plain, rates, {}, steps, tuning), steps),
        "SGD, momentum .9": (plain, chosen(plain, slow, momentum, steps, tuning), steps),
        "filter": (filtered, chosen(filtered, rates, {}, steps, tuning), steps),
        "filter, difference": (filtered, {}, steps),  # at the learning rate of the one above
        "filter, self-tuned": (filtered, {"lr": None}, steps),
        "SGD, the filter's time": (plain, chosen(plain, rates, {}, longer, tuning), longer),
        "momentum, the filter's time": (plain, chosen(plain, slow, momentum, longer, tuning), longer),
    }
    rows["filter, difference"] = (filtered, rows["filter"][1] | {"change": "difference"}, steps)
    found = {
        name: [train(make, options, seed, count, errors=make is filtered) for seed in range(seeds)]
        for name, (make, options, count) in rows.items()
    }
    print(f"\ndigits, {seeds} seeds{'lr':>16}{'steps':>8}{'test accuracy, %':>22}{'test loss':>20}{'training loss':>20}")
    for name, results in found.items():
        _, options, count = rows[name]
        cells = [interval([result[key] for result in results]) for key in ("accuracy", "test", "train")]
        rate = "self" if options["lr"] is None else f"{options['lr']:g}"
        text = "".join(
            f"{mean:>13.{digits}f} ± {half:<6.{digits}f}" for (mean, half), digits in zip(cells, (2, 3, 3), strict=True)
        )
        print(f"{name:<28}{rate:>5}{count:>8}{text}")
        key = name.lower().replace(", ", "_").replace(" ", "_").replace(".", "").replace("'", "").replace("-", "_")
        for (mean, half), part in zip(cells, ("accuracy", "test_loss", "training_loss"), strict=True):
            figures |= {f"digits_{key}_{part}": mean, f"digits_{key}_{part}_half": half}
    for name in (name for name, (make, *_) in rows.items() if make is filtered):
        key = name.removeprefix("filter, ").replace(" ", "_").replace("-", "_")
        middle, width = interval([math.log(result["ratio"]) for result in found[name]])
        figures[f"digits_squared_error_batch_over_{key}"] = math.exp(middle)
        low, high = math.exp(middle - width), math.exp(middle + width)
        print(f"squared error of the batch gradient over that of m, {name}: {math.exp(middle):.2f} [{low:.2f}, {high:.2f}]")
    figures["digits_accuracy_filter_minus_momentum"] = (
        figures["digits_filter_accuracy"] - figures["digits_sgd_momentum_9_accuracy"]
    )
    met = all(figures[key] >= least for key, (_, least) in TARGETS.items())
    figures = {key: value if math.isfinite(value) else None for key, value in figures.items()}  # type: ignore[misc]
    print(json.dumps({"benchmark": "gradient_filter", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
