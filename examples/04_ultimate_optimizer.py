"""
The ultimate optimizer
======================

A learning rate that is wrong by a factor of ten thousand costs a whole training run. Here the optimizer finds the size of the
rate while it trains, by gradient descent on the rate itself; and the derivative that it uses, which looks one step ahead, is
compared with the exact one of the whole run.

Needs scikit-learn for its digits. Takes some ten seconds on one core.
"""

# %%
# Data and model
# --------------
# 1200 images of 8 × 8 pixels to train on, 597 to test.

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from retrograd import Classification, Queries, Unrolled, record
from retrograd.optim import HyperSGD

torch.set_num_threads(1)
pixels, classes = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def batches(steps, size=128):
    return torch.randint(1200, (steps, size), generator=torch.Generator().manual_seed(1))


# %%
# An ordinary loop
# ----------------
# ``HyperSGD`` stands where ``torch.optim.SGD`` stood; nothing else changes.


def fit(make_optimizer, steps=500):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    rates = []
    for ids in batches(steps):
        optimizer.zero_grad()
        cross_entropy(model(images[ids]), labels[ids]).backward()
        optimizer.step()
        if isinstance(optimizer, HyperSGD):
            rates.append(optimizer.hyperparameters()[0]["learning_rate"])
    with torch.no_grad():
        accuracy = (model(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()
    return accuracy, rates


print(f"{'start':>8}{'SGD':>10}{'HyperSGD':>12}   learned rate after 10, 50, 500 steps")
for lr in (1e-5, 1e-3, 1e-1):
    plain, _ = fit(lambda parameters: torch.optim.SGD(parameters, lr=lr))  # noqa: B023
    learned, rates = fit(lambda parameters: HyperSGD(parameters, lr=lr, hyper="sgd", hyper_lr=0.1))  # noqa: B023
    print(f"{lr:>8g}{plain:>10.3f}{learned:>12.3f}   " + "  ".join(f"{rates[step - 1]:.2g}" for step in (10, 50, 500)))

# %%
# How far does it see?
# --------------------
# The derivative of the next batch's loss by the rate, −⟨g_{t+1}, g_t⟩, ends one step ahead. A recorded run knows the derivative
# of the final training loss by the rate of every step, −⟨λ_{t+1}, g_t⟩, with λ the costates that ``Unrolled`` walks back.

data = (images[:1200].double(), labels[:1200])


def flat(leaves):
    return torch.cat([leaf.flatten() for leaf in leaves.values()])


def derivatives(lr):
    """By log η_t for each step t but the last: the greedy derivative and the exact one."""
    run = record(
        make_model().double(), data, Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=lr), order=batches(100)
    )
    state, places = run.state(0), []
    for step in range(len(run)):
        places.append(flat(state.params))
        state = run.advance(state, step)
    places.append(flat(state.params))
    gradients = [(before - after) / lr for before, after in pairwise(places)]

    cotangents = Queries(data, of="losses", mean=True).gradients(run, run.final_state)
    costate, exact = flat(cotangents.params), []
    for step, costates in Unrolled().costates(run, cotangents):
        exact.append(-lr * (costate @ gradients[step]))
        costate = flat(costates.params).clone()
    greedy = [-lr * (new @ old) for old, new in pairwise(gradients)]
    return torch.stack(greedy), torch.stack(exact[::-1])[:-1]


print(f"\n{'rate':>8}{'greedy sum':>13}{'exact sum':>12}{'cosine':>9}{'same sign':>11}")
for lr in (0.01, 0.1, 1.0):
    greedy, exact = derivatives(lr)
    same = (greedy.sign() == exact.sign()).double().mean()
    print(f"{lr:>8g}{greedy.sum():>13.3f}{exact.sum():>12.3f}{cosine_similarity(greedy, exact, dim=0):>9.2f}{same:>11.0%}")

# %%
# Where the rate is far too small, one step ahead and the end of training agree: up. Around the rate at which it settles, some
# 0.25 here, they part: noise and curvature make the next batch prefer a smaller rate, while the end of training would still
# gain from a larger one. It is a way to a rate of the right size, and not to the best one.
