"""
Ten digits instead of a thousand
================================

Dataset distillation learns a handful of synthetic examples on which a network trains as if it had seen the whole data set. It
is also the clearest case of a trap: the cheap way to do it, going on with the network of the step before, ends with a good
network and worthless data. An audit tells the two apart.

Needs scikit-learn for its digits. Takes some twenty seconds on one core.
"""

# %%
# Data and model
# --------------
# 1200 images of 8 × 8 pixels to distil, 597 to judge by.

import tempfile
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from retrograd import FirstOrder
from retrograd.errors import UntrustedGradient
from retrograd.hypergradients import DistilledData, distil_dataset

torch.set_num_threads(1)
pixels, classes = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]
real, unseen = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def make_model(seed):  # torch's generator is seeded by then
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


# %%
# A cold start
# ------------
# Each of 100 outer steps trains a *new* network for 10 steps on the ten synthetic digits, asks for its loss on the real ones,
# and differentiates that exactly by the pixels, the soft labels and the learning rate.

cold = distil_dataset(make_model, real, size=10, steps=10, outer_steps=100)
print(f"learning rate {cold.learning_rate:.2f}; labels of the first digit: {[round(p, 2) for p in cold.labels[0].tolist()]}")

# %%
# The audit trains networks that nobody has seen before on the data that were found, on the same inputs with labels that belong
# to others, and on the noise that it all began with. The figures are accuracies on images that nothing was trained on.

judged = cold.audit(unseen)
print(judged)
assert judged["retrained"].mean > 0.8

# %%
# A warm start
# ------------
# Now one network goes on and on, five steps at a time, while the data change beneath it, and the derivative looks at the last
# step only. That is how large bilevel problems are often solved.

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UntrustedGradient)  # it says that four of five steps are left out
    warm = distil_dataset(
        make_model,
        real,
        steps=5,
        outer_steps=200,
        start="warm",
        method=FirstOrder(),
        learn_rate=False,
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.01),
    )
judged = warm.audit(unseen)
print(judged)
assert judged["meta-trained"].mean > 0.8
assert judged["retrained"].mean < 0.3

# %%
# The network is about as good as before. But it learned what it knows from two hundred sets of ten digits, one after the other;
# the last of them teaches a new network nothing at all.
#
# Keep what was found
# -------------------
# One file of plain tensors, with a digest: inputs, labels, and how they are meant to be used.

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "ten-digits.safetensors"
    cold.save(file)
    opened = DistilledData.open(file)
    torch.manual_seed(1)
    model = make_model(1)
    opened.train(model)
with torch.no_grad():
    accuracy = (model(unseen[0]).argmax(1) == unseen[1]).float().mean().item()
print(f"a network trained for {opened.steps} steps on ten synthetic digits: {accuracy:.3f}")
