"""
Where should training begin?
============================

Where training ends depends on where it began. Two ways to choose a start: one for a whole family of tasks, from
which each is learned in five steps; and one for each problem, predicted from what is known of it and from solutions of others.

Takes some twenty seconds on one core.
"""

# %%
# One start for many tasks
# ------------------------
# A task is a sinusoid with its own height and phase: ten points to train on, twenty to be judged by. All tasks of an outer step
# are trained in one recorded run, and the derivative of what they end at goes exactly through their five steps.

import copy
import math

import torch
from torch import nn

from retrograd.hypergradients import LearnedInitialiser, adapt, meta_initialise, solve

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)


def sinusoids(count):
    height, phase = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=draw), math.pi * torch.rand(count, 1, 1, generator=draw)
    inputs = 10 * torch.rand(count, 30, 1, generator=draw) - 5
    targets = height * torch.sin(inputs + phase)
    return (inputs[:, :10], targets[:, :10]), (inputs[:, 10:], targets[:, 10:])


torch.manual_seed(0)
fresh = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
new_tasks, judged = sinusoids(200)


def error(model, steps):
    return adapt(model, new_tasks, steps=steps, learning_rate=0.02).measurements(judged).mean().item()


errors = {"random start": error(fresh, 5), "random start, 50 steps": error(fresh, 50)}
for order in ("first", "exact"):
    model = copy.deepcopy(fresh)
    meta_initialise(model, lambda _: sinusoids(15), steps=5, learning_rate=0.02, outer_steps=150, order=order)
    errors[f"learned, {order} order"] = error(model, 5)
for name, value in errors.items():
    print(f"{name:<24} squared error after training on a new sinusoid: {value:.2f}")
assert errors["learned, exact order"] < errors["random start"] / 2

# %%
# A start for each problem
# ------------------------
# Minimise ‖x − m(c)‖² + 2 Σ (1 − cos 3(x − m(c))) in eight dimensions, for a context c. Each dimension has several valleys, so
# from a random start the best of all is hardly ever found. We have 400 old problems, with the solutions that descent found.

waves, slopes = torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)


def objective(points, contexts):
    off = points - 1.5 * torch.sin(contexts @ waves / 2) - 0.35 * contexts @ slopes
    return (off.square() + 2 * (1 - torch.cos(3 * off))).sum(1)


def solved(contexts, starts):
    return solve(objective, contexts, starts, steps=100, learning_rate=0.04).final_state.params["points"]


old, new = torch.randn(400, 4, generator=draw), torch.randn(500, 4, generator=draw)
solutions = solved(old, 6 * torch.rand(400, 8, generator=draw) - 3)
learned = LearnedInitialiser(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)))
learned.fit(old, solutions, epochs=300)
starts = {
    "random": 6 * torch.rand(500, 8, generator=draw) - 3,
    "mean of old solutions": solutions.mean(0).expand(500, 8),
    "learned from old solutions": learned(new),
}

# %%
# Old solutions are mostly bad ones, and yet their mistakes average out. Better still is to ask what descent makes of a start:
# three of its steps are differentiated through. Not all hundred: descent that has arrived has forgotten where it came from.

learned.tune(objective, old, steps=3, learning_rate=0.04, epochs=150, rate=0.01)
starts["then tuned"] = learned(new)
found = {name: (objective(solved(new, start), new) < 0.01).float().mean().item() for name, start in starts.items()}
for name, share in found.items():
    print(f"{name:<28} reaches the global minimum of new problems in {share:.0%} of cases")
assert found["learned from old solutions"] > 2 * found["mean of old solutions"]
