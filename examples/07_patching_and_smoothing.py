"""Two questions of one line each: how far should fine-tuning go, and would softer labels have helped?"""

# %% A network that knows the digits 0 to 4 is fine-tuned on 5 to 9. It learns them, and forgets the others.
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import retrograd
from retrograd import Classification, Queries
from retrograd.hypergradients import label_smoothing_gradient, patch

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]
old, new = train[labels[train] < 5], train[labels[train] >= 5]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def trained(rows, epochs, rate):
    return retrograd.record(
        model,
        (images[rows], labels[rows]),
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9),
        epochs=epochs,
        batch_size=32,
    )


trained(old, epochs=20, rate=0.05)
tuned = trained(new, epochs=8, rate=0.02)

# %% The loss on all digits, along the straight way from the one model to the other.
everything = Queries((images[test], labels[test]), of="losses", mean=True)
way = patch(tuned, everything, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
for alpha, value, slope in zip(way.alphas, way.values[:, 0], way.slopes[:, 0], strict=True):
    print(f"{alpha:.1f} of the way: loss {value:.2f}, slope {slope:+.2f}")
print(f"best: {way.best:.1f} of the way")

# %% A fifth of the labels is wrong. Which targets should have been softer?
generator = torch.Generator().manual_seed(1)
wrong = torch.rand(len(train), generator=generator) < 0.2
noisy = torch.where(wrong, (labels[train] + torch.randint(1, 10, (len(train),), generator=generator)) % 10, labels[train])
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
run = retrograd.record(
    model,
    (images[train], noisy),
    Classification(),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    epochs=8,
    batch_size=64,
)
found = label_smoothing_gradient(run, Queries((images[test], labels[test]), of="losses", mean=True))[0]
print(f"smoothing all labels by .01 would change the test loss by {0.01 * found.sum():+.4f}")
print(f"the labels that should be softer are the wrong ones: ROC-AUC {roc_auc_score(wrong, -found):.2f}")
