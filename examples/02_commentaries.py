"""
Teaching with commentaries
==========================

Two labels in five are wrong, and a hundred are known to be right. How much should each of the five hundred others count? The
derivative of the trained model's validation loss by every weight says it, through all of training. What is learned this way is
a commentary on the data: it is kept in a file beside them, and makes other models better, too.

Needs scikit-learn for its digits. Takes half a minute on one core.
"""

# %%
# Data
# ----
# 500 images of 8 × 8 pixels to train on, 100 with clean labels to validate, 1197 to test. The third column says which example
# each is: a commentary with a weight for each example has to know.

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn

from retrograd import Classification, Queries, audit, meta_train, record
from retrograd.hypergradients import Commentary, ExampleWeights, Weighted

torch.set_num_threads(1)
pixels, classes = load_digits(return_X_y=True)
images, truth = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
draw = torch.Generator().manual_seed(0)
order = torch.randperm(len(truth), generator=draw)
images, truth = images[order], truth[order]

labels = truth[:500].clone()
wrong = torch.randperm(500, generator=draw)[:200]
labels[wrong] = (labels[wrong] + torch.randint(1, 10, (200,), generator=draw)) % 10
data = (images[:500], labels, torch.arange(500))
validation, test = (images[500:600], truth[500:600]), (images[600:], truth[600:])


def student(seed, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def batches(seed, steps=80):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(500, generator=generator).view(5, 100) for _ in range(steps // 5)])


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def accuracy(model):
    return (model(test[0]).argmax(1) == test[1]).float().mean()


# %%
# Learning the weights
# --------------------
# One training is recorded, with a weight σ(φ_a) on the loss of each example, at first ½ for all. Then φ is improved: train,
# walk back through all 80 steps, change φ a little; from another start each time, so that φ does not fit one student.

run = record(
    student(0),
    data,
    Weighted(Classification("loss"), steps=80),
    optimizer=adam,
    order=batches(0),
    meta=ExampleWeights(500),
)


def vary(number):
    start = {name: leaf.detach().clone() for name, leaf in student(number + 1).named_parameters()}
    return {"initial": replace(run.state(0), params=start), "order": batches(number + 1)}


found = meta_train(
    run, Queries(validation, mean=True), optimizer=lambda phi: torch.optim.Adam(phi, lr=0.3), steps=20, vary=vary
)
print("validation loss of the student:", " ".join(f"{step.outcome:.2f}" for step in found.history[::4]))

weights = found.meta["logits"].sigmoid()
clean = torch.ones(500, dtype=torch.bool)
clean[wrong] = False
print(f"mean weight: {weights[clean].mean():.2f} of right labels, {weights[~clean].mean():.2f} of wrong ones")
above = (weights[clean][:, None] > weights[~clean][None]).double().mean()
print(f"a right label has the larger weight than a wrong one in {above:.1%} of all pairs")

# %%
# Is it the commentary?
# ---------------------
# The controls: the same weights dealt out at random, the weights as they were, and no training data at all, but the hundred
# validation images alone.

alone = record(student(0), validation, Classification("loss"), optimizer=adam, epochs=80, batch_size=100)
judgement = audit(found, accuracy, alone=alone, repeats=2, vary=lambda n: vary(100 + n), larger_is_better=True)
print(judgement)

# %%
# Kept beside the data, and used again
# ------------------------------------
# The file says which data it is about, which training it was learned on, and what the controls came to. It is refused for other
# data. The student here is twice as wide and trains three times as long.

with TemporaryDirectory() as folder:
    file = Path(folder) / "digits-weights.safetensors"
    Commentary.of(found, judgement).save(file)
    commentary = Commentary.open(file, ExampleWeights(500), data)
    print(commentary)
    try:
        Commentary.open(file, ExampleWeights(500), (images[:500], truth[:500], torch.arange(500)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

options = {"optimizer": adam, "order": batches(300, 240)}
taught = record(student(300, 64), data, commentary.task(Classification()), meta=commentary.module, **options)
plain = record(student(300, 64), data, Classification(), **options)
for name, trained in (("with the commentary", taught), ("without", plain)):
    print(f"{name:<22}{trained.update_map.ask(accuracy, trained.final_state).item():.3f}")
