"""Which direction does training on separable data turn to, and how fast? Clean descent, and descent on worst inputs.

    python benchmarks/adversarial_bias.py [--quick]

Loss mean exp(−y θᵀx), whole batches, η = .2, from θ = 0; the perturbed inputs are x − c y θ/‖θ‖. Error: ‖θ/‖θ‖ − u‖ with u the
l2 max-margin direction. With c(T) = γ(1 − T^{−½}), γ the margin, the radius is constant in a run of T steps: a run for each T.
Slopes are those of a line through log error against log T, T = 1e2 … 1e5.

**Two points** z = y x in {(1, 2), (1, −.5)}, γ = 1, u = (1, 0): built so that the two support vectors pull unequally.
**Twenty points**, drawn without looking at the outcome: z_1 > 0 in two dimensions, u and γ by a search over angles. There
are no targets for it: what slopes it has, it has.

Beside that: the run that the library records, at T = 100, is the plain loop.

Reference: Li, Fang, Xu, Zhao (2020), "Implicit bias of gradient descent based adversarial training on separable data".
"""

import argparse
import json
import math

import numpy as np
import torch
from torch import nn

from retrograd import record
from retrograd.adversarial import Adversarial, SignedClassification, radius_for

TARGETS = {
    "clean_slope": [">=", -0.2],
    "growing_slope": ["<=", -0.4],
    "recorded_difference": ["<=", 1e-12],
}
RATE = 0.2


def descend(points: np.ndarray, radius: float, steps: int) -> np.ndarray:
    """Plain descent in numpy, 1e5 steps of which take a second."""
    theta = np.zeros(points.shape[1])
    for _ in range(steps):
        length = math.sqrt(theta @ theta)
        shares = np.exp(radius * length - points @ theta) / len(points)
        gradient = -shares @ points
        if length > 0:
            gradient = gradient + radius * shares.sum() / length * theta
        theta = theta - RATE * gradient
    return theta


def recorded(points: np.ndarray, radius: float, steps: int) -> np.ndarray:
    model = nn.Linear(points.shape[1], 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = (torch.as_tensor(points), torch.ones(len(points), dtype=torch.float64))
    task = Adversarial(SignedClassification(), radius, steps=0)
    run = record(model, data, task, optimizer=lambda p: torch.optim.SGD(p, lr=RATE), epochs=steps, batch_size=len(points))
    return run.final_state.params["weight"][0].numpy()


def widest(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The max-margin direction through 0 in the plane, and its margin."""
    low, high = -math.pi, math.pi
    for _ in range(12):  # each time the best angle of a finer grid
        angles = np.linspace(low, high, 2001)
        margins = (points @ np.stack([np.cos(angles), np.sin(angles)])).min(0)
        best, width = angles[margins.argmax()], (high - low) / 1000
        low, high = best - width, best + width
    return np.array([math.cos(best), math.sin(best)]), float(margins.max())


def errors(points: np.ndarray, lengths: list[int]) -> dict[str, list[float]]:
    direction, margin = widest(points)
    radii = {
        "clean": lambda steps: 0.0,
        "fixed": lambda steps: 0.9 * margin,
        "growing": lambda steps: radius_for(steps, margin),
    }
    found: dict[str, list[float]] = {}
    for name, radius in radii.items():
        ends = [descend(points, radius(steps), steps) for steps in lengths]
        found[name] = [float(np.linalg.norm(end / np.linalg.norm(end) - direction)) for end in ends]
    return found


def slope(lengths: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to T = 1e4")
    lengths = [10**power for power in range(2, 5 if parser.parse_args().quick else 6)]
    torch.set_num_threads(1)
    two = np.array([[1.0, 2.0], [1.0, -0.5]])
    generator = np.random.default_rng(0)
    many = generator.normal(size=(20, 2))
    many = many * np.sign(many[:, :1]) + np.array([0.3, 0.0])  # labels are the sign of the first feature
    figures: dict[str, float] = {}
    for title, prefix, points in (("two points", "", two), ("twenty random points", "random_", many)):
        direction, margin = widest(points)
        print(f"{title}: margin {margin:.4f}, direction ({direction[0]:.4f}, {direction[1]:.4f})")
        print(f"{'radius':<22}" + "".join(f"{f'T = {steps:.0e}':>12}" for steps in lengths) + f"{'slope':>9}")
        for name, values in errors(points, lengths).items():
            label = {"clean": "0", "fixed": ".9 γ", "growing": "γ (1 − T^−½)"}[name]
            own = slope(lengths, values)
            print(f"{label:<22}" + "".join(f"{value:12.4f}" for value in values) + f"{own:9.2f}", flush=True)
            figures |= {f"{prefix}{name}_{steps}": value for steps, value in zip(lengths, values, strict=True)}
            figures[f"{prefix}{name}_slope"] = own
        figures[f"{prefix}margin"] = margin
    differences = [np.abs(recorded(two, c, 100) - descend(two, c, 100)).max() for c in (0.0, radius_for(100))]
    figures["recorded_difference"] = float(max(differences))
    print(f"recorded run against the plain loop at T = 100: {figures['recorded_difference']:.1e}")
    met = all(figures[key] >= bound if sign == ">=" else figures[key] <= bound for key, (sign, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "adversarial_bias", "figures": figures, "targets": TARGETS, "met": met}))


if __name__ == "__main__":
    main()
