"""Which pre-training tasks are worth their while? The outcome of fine-tuning says so, through both stages of training."""

# %% Fifty binary tasks on 900 digits: six groups of digits, and 44 half-spaces of pixels that hardly vary. Nobody says which.
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import retrograd
from retrograd import All, Classification
from retrograd.hypergradients import MultitaskLoss, TaskWeights

generator = torch.Generator().manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels), generator=generator)
images, labels = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
deviation = images[:900].std(0)
groups = torch.stack([torch.randperm(10, generator=generator)[:5] for _ in range(6)])
useful = (labels[:900, None, None] == groups).any(2)
quiet = deviation.argsort()[(deviation == 0).sum() :][:12]
along = images[:900, quiet] @ torch.randn(12, 44, generator=generator)
tasks = torch.cat([useful, along > along.median(0).values], 1).float()
images = ((images - images[:900].mean(0)) / (deviation + 0.02)).clamp(-3, 3)
few, held_out, test = slice(900, 960), slice(960, 1020), slice(1020, None)


class Net(nn.Module):
    """An encoder of eight numbers, and a head."""

    def __init__(self, outputs):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(64, 8), nn.Tanh()), nn.Linear(8, outputs)

    def forward(self, images):
        """Return logits."""
        return self.head(self.encoder(images))


# %% Pre-train on all of them, with weights of 1, then train a head for the ten digits on 60 images.
torch.manual_seed(0)
model, tuned = Net(50), Net(10)
pretraining = retrograd.record(
    model,
    (images[:900], tasks),
    MultitaskLoss(),
    optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
    order=[torch.randperm(900, generator=generator)[:128] for _ in range(120)],
    meta=TaskWeights(50),
    checkpoints=All(),
)
tuned.encoder.load_state_dict(model.encoder.state_dict())
frozen = {"params": tuned.encoder.parameters(), "lr": 0.0}  # part of the state, so that costates of it are known
finetuning = retrograd.record(
    tuned,
    (images[few], labels[few]),
    Classification(),
    optimizer=torch.optim.Adam([{"params": tuned.head.parameters()}, frozen], lr=0.1),
    order=torch.arange(60).repeat(15, 1),
    checkpoints=All(),
)
both = retrograd.chain(pretraining, finetuning)


def loss(model):
    return F.cross_entropy(model(images[held_out]), labels[held_out])


# %% Learn the weights through all 135 steps, from a cold start each time.
found = retrograd.meta_train(both, loss, optimizer=lambda z: torch.optim.Adam(z, lr=0.3), steps=20)
weights = TaskWeights(50)
weights.load_state_dict(found.meta)
print(f"held-out loss: {found.history[0].outcome:.2f} at first, {found.history[-1].outcome:.2f} in the end")
print(f"the useful tasks weigh more: ROC-AUC {roc_auc_score([1] * 6 + [0] * 44, weights().detach()):.2f}")


# %% Judge them by training anew, on digits that nothing has seen.
def accuracy(model):
    return (model(images[test]).argmax(1) == labels[test]).float().mean()


print(retrograd.audit(found, accuracy, larger_is_better=True))
