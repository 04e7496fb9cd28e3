"""
Pre-training that knows what it is for
======================================

Pre-train on many tasks, fine-tune on the one you care about: which of the many are worth it? Give each a weight, and ask for
the derivative of the *fine-tuned* model's validation loss by these weights. That derivative runs back through fine-tuning, the
hand-over and every step of pre-training; retrograd walks it exactly. Raghu et al. (2021) approximate it: they take pre-training
to have converged, and invert its Hessian by a series of one or two terms. Both are tried here.

Needs scikit-learn for its digits. Takes some thirty seconds on one core.
"""

# %%
# Twenty tasks, four of them of use
# ---------------------------------
# 900 images have 20 binary labels each: 4 say whether the digit is in some random group of five, 16 on which side of a random
# plane the quietest pixels lie. Fine-tuning has 120 images with their digits, half of them for validation.

import time
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from retrograd import Classification, chain, fresh_start, meta_train, record
from retrograd.errors import UntrustedGradient
from retrograd.hypergradients import MultitaskLoss, TaskWeights, pretraining_estimator

torch.set_num_threads(1)
warnings.simplefilter("ignore", UntrustedGradient)  # the estimator warns that pre-training has not settled, and it is right

draw = torch.Generator().manual_seed(0)
pixels, classes = load_digits(return_X_y=True)
shuffled = torch.randperm(len(classes), generator=draw)
images = torch.tensor(pixels / 16, dtype=torch.float32)[shuffled]
digits = torch.tensor(classes)[shuffled]

groups = torch.stack([torch.randperm(10, generator=draw)[:5] for _ in range(4)])
useful = (digits[:900, None, None] == groups).any(2)
deviation = images[:900].std(0)
quiet = deviation.argsort()[(deviation == 0).sum() :][:24]
side = images[:900, quiet] @ torch.randn(24, 16, generator=draw)
targets = torch.cat([useful, side > side.median(0).values], 1).float()
images = ((images - images[:900].mean(0)) / (deviation + 0.02)).clamp(-3, 3)

pretraining_data = (images[:900], targets)
train, validation, test = slice(900, 960), slice(960, 1020), slice(1020, None)

# %%
# Two stages
# ----------
# An encoder with 8 units learns the tasks, weighted by a meta-module; then a new head learns the digits on top of it. The
# encoder stays as it is then, but has to be known to the optimizer (with a rate of 0): so derivatives by it are known, too.


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self, outputs):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 8), nn.Tanh())
        self.head = nn.Linear(8, outputs)

    def forward(self, images):
        """Return the logits."""
        return self.head(self.encoder(images))


def batches(steps, seed, size=128):
    return torch.randint(900, (steps, size), generator=torch.Generator().manual_seed(seed))


def two_stages(steps, head_steps):
    torch.manual_seed(0)
    model, finetuned = Net(20), Net(10)
    pretraining = record(
        model,
        pretraining_data,
        MultitaskLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        order=batches(steps, seed=0),
        meta=TaskWeights(20),
    )
    finetuned.encoder.load_state_dict(model.encoder.state_dict())
    finetuning = record(
        finetuned,
        (images[train], digits[train]),
        Classification(),
        optimizer=torch.optim.Adam(
            [{"params": finetuned.head.parameters()}, {"params": finetuned.encoder.parameters(), "lr": 0.0}], lr=0.1
        ),
        order=torch.arange(60).repeat(head_steps, 1),
    )
    return chain(pretraining, finetuning)


def validation_loss(model):
    return cross_entropy(model(images[validation]), digits[validation])


def adam(lr):
    return lambda leaves: torch.optim.Adam(leaves, lr=lr)


# %%
# Exactly
# -------
# 60 steps of pre-training and 15 of the head, differentiated through from end to end, from a new start and with other batches
# each time: a derivative of one start fits that start.

both, began = two_stages(60, 15), time.perf_counter()


def another(number):
    return {"initial": fresh_start(both.stages[0], lambda seed: Net(20), number), "order": batches(60, seed=number + 1)}


exact = meta_train(both, validation_loss, optimizer=adam(0.3), steps=15, vary=another)
exact_seconds = time.perf_counter() - began

# %%
# By the paper's estimator
# ------------------------
# 5 steps of each stage, a Neumann series with one Hessian product, and on with the same model: a warm start.

few, began = two_stages(5, 5), time.perf_counter()
estimated = meta_train(
    few,
    validation_loss,
    optimizer=adam(0.1),
    steps=120,
    start="warm",
    method=pretraining_estimator(3e-3),
    vary=lambda number: {"order": batches(5, seed=number)},
)
estimated_seconds = time.perf_counter() - began

# %%
# What were the weights worth?
# ----------------------------
# That only shows when someone else pre-trains with them, from the beginning and for longer. A linear head on the frozen encoder
# then learns all 120 labels.


def weights_of(values):
    module = TaskWeights(20)
    module.load_state_dict(values)
    return module().detach()


def accuracy(weights, steps=600):
    torch.manual_seed(1)
    model, head = Net(20), nn.Linear(8, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for ids in batches(steps, seed=99):
        optimizer.zero_grad()
        MultitaskLoss().losses(model, (images[ids], targets[ids]), lambda: weights).mean().backward()
        optimizer.step()
    features = model.encoder(images).detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(head(features[900:1020]), digits[900:1020]).backward()
        optimizer.step()
    return (head(features[test]).argmax(1) == digits[test]).float().mean().item()


oracle = torch.cat([torch.full((4,), 5.0), torch.zeros(16)])
rows = {
    "all weights equal": (torch.ones(20), 0.0),
    "the paper's estimator": (weights_of(estimated.meta), estimated_seconds),
    "exact": (weights_of(exact.meta), exact_seconds),
    "the useful ones alone": (oracle, 0.0),
}
print(f"{'weights':<24}{'useful':>8}{'nuisance':>10}{'test accuracy':>15}{'seconds':>9}")
for name, (weights, seconds) in rows.items():
    print(f"{name:<24}{weights[:4].mean():>8.2f}{weights[4:].mean():>10.2f}{accuracy(weights):>15.3f}{seconds:>9.1f}")

# %%
# ``python benchmarks/pretraining.py`` does this with more seeds, more tasks and all the controls: permuted weights, training on
# fine-tuning's labels from the start, and the angle between the two derivatives.
