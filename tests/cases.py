"""Small training cases: models of a few hundred parameters at most, in float64, on generated data.

Beside each module stands its *formula*: the same forward pass in plain arithmetic, as a function

    formula(params, buffers, inputs, draw) -> (outputs, buffers after the pass)

with ``draw`` a generator for random masks in training mode, and None in evaluation mode.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Regression, Trajectory, record
from retrograd.trajectory import Schedule

EXAMPLES, QUERIES, BATCH, EPOCHS = 14, 4, 4, 2  # batches of 4, 4, 4 and 2, twice: eight steps

Formula = Callable[[dict, dict, Tensor, torch.Generator | None], tuple[Tensor, dict]]


def linear(params: dict, name: str, inputs: Tensor) -> Tensor:
    return inputs @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def gelu(inputs: Tensor) -> Tensor:
    return inputs * (1 + torch.erf(inputs / math.sqrt(2))) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Models and their formulas


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def mlp_formula(params, buffers, inputs, draw):
    hidden = torch.tanh(linear(params, "2", gelu(linear(params, "0", inputs))))
    return linear(params, "4", hidden), buffers


def batchnorm() -> nn.Module:
    # No bias before it: its gradient would be 0 but for rounding, which Adam divides by its own size.
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, momentum=0.3), nn.GELU(), nn.Linear(5, 3))


def batchnorm_formula(params, buffers, inputs, draw):
    hidden = inputs @ params["0.weight"].T
    mean, variance = buffers["1.running_mean"], buffers["1.running_var"]
    if draw is not None:
        size = len(hidden)
        own_mean = hidden.sum(0) / size
        own_variance = ((hidden - own_mean) ** 2).sum(0) / size
        buffers = {
            "1.running_mean": 0.7 * mean + 0.3 * own_mean,
            "1.running_var": 0.7 * variance + 0.3 * own_variance * size / (size - 1),
        }
        mean, variance = own_mean, own_variance
    hidden = (hidden - mean) / torch.sqrt(variance + 1e-5) * params["1.weight"] + params["1.bias"]
    return linear(params, "3", gelu(hidden)), buffers


def dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 5), nn.GELU(), nn.Dropout(0.2), nn.Linear(5, 3)
    )


def dropout_formula(params, buffers, inputs, draw):
    def drop(hidden: Tensor, share: float) -> Tensor:
        if draw is None:
            return hidden
        return hidden * torch.empty_like(hidden).bernoulli_(1 - share, generator=draw) / (1 - share)

    hidden = drop(torch.tanh(linear(params, "0", inputs)), 0.3)
    return linear(params, "6", drop(gelu(linear(params, "3", hidden)), 0.2)), buffers


class Tied(nn.Module):
    """Predicts a token from two others; the decoder's matrix is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))


def tied_formula(params, buffers, tokens, draw):
    matrix = params["embedding.weight"]
    return torch.tanh(linear(params, "hidden", (matrix[tokens[:, 0]] + matrix[tokens[:, 1]]) / 2)) @ matrix.T, buffers


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 4, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def cnn_formula(params, buffers, images, draw):
    def convolve(name: str, inputs: Tensor, groups: int) -> Tensor:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        patches = inputs.unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)  # batch in height width kernel kernel
        patches = patches.unflatten(1, (groups, -1))
        return (
            torch.einsum("bgihwkl,goikl->bgohw", patches, weight.unflatten(0, (groups, -1))).flatten(1, 2) + bias[:, None, None]
        )

    hidden = gelu(convolve("0", F.pad(images, (1, 1, 1, 1)), 1))
    hidden = (hidden[..., ::2, ::2] + hidden[..., 1::2, ::2] + hidden[..., ::2, 1::2] + hidden[..., 1::2, 1::2]) / 4
    return linear(params, "6", torch.tanh(convolve("3", hidden, 2)).flatten(1)), buffers


class Attention(nn.Module):
    """One causal layer of attention with two heads, averaged over places; no bias of the keys, whose gradient is 0."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.qkv(inputs).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)  # three times batch head place 2
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(torch.tanh(mixed.transpose(1, 2).flatten(2)).mean(1))


def attention_formula(params, buffers, inputs, draw):
    query, key, value = (inputs @ params["qkv.weight"].T).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    products = torch.exp(query @ key.transpose(-1, -2) / math.sqrt(2)) * torch.ones(3, 3, dtype=inputs.dtype).tril()
    mixed = products / products.sum(-1, keepdim=True) @ value
    return linear(params, "out", torch.tanh(mixed.transpose(1, 2).flatten(2)).mean(1)), buffers


# ---------------------------------------------------------------------------------------------------------------------
# Data


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def tabular(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(count, 3, seed=seed), labels(count, 3, seed)


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return labels(2 * count, 5, seed).view(count, 2), labels(count, 5, seed + 1)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(count, 1, 4, 4, seed=seed), normal(count, 2, seed=seed + 1)


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(count, 3, 4, seed=seed), normal(count, 2, seed=seed + 1)


WEIGHTS = 0.5 + torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Cases


_CLASSIFICATION, _REGRESSION = Classification(), Regression("prediction")


@dataclass(frozen=True)
class Case:
    """A model, its formula, data, and what is special about its training."""

    build: Callable[[], nn.Module]
    formula: Formula
    data: Callable[[int, int], tuple[Tensor, Tensor]] = tabular
    task: Classification | Regression = _CLASSIFICATION
    weights: Tensor | None = None
    clip_norm: float | None = None
    frozen: tuple[str, ...] = ()
    second_group: tuple[str, ...] = ()  # half the learning rate, and its own weight decay
    seed: int = 0

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self.build().double()
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    @property
    def examples(self) -> tuple[Tensor, Tensor]:
        return self.data(EXAMPLES, 100)

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.data(QUERIES, 200)

    @property
    def all_weights(self) -> Tensor:
        return torch.ones(EXAMPLES, dtype=torch.float64) if self.weights is None else self.weights

    def groups(self, rule: "Rule") -> list[tuple[tuple[str, ...], dict]]:
        """Names and options of each parameter group; frozen parameters are given to the optimizer, too."""
        names = [name for name, _ in self.model().named_parameters()]
        groups = [(tuple(name for name in names if name not in self.second_group), rule.options)]
        if self.second_group:
            own = {**rule.options, "lr": rule.options["lr"] / 2, "weight_decay": 0.03}
            groups.append((self.second_group, own))
        return groups

    def record(self, rule: "Rule", checkpoints: Schedule | None = None, reverse_parameters: bool = False) -> Trajectory:
        model = self.model()
        groups = [(list(names), options) for names, options in self.groups(rule)]
        if reverse_parameters:
            groups = [(names[::-1], options) for names, options in reversed(groups)]
        optimizer = rule.optimizer([{"params": [model.get_parameter(name) for name in names], **o} for names, o in groups])
        return record(
            model,
            self.examples,
            self.task,
            optimizer=optimizer,
            epochs=EPOCHS,
            batch_size=BATCH,
            clip_norm=self.clip_norm,
            weights=self.weights,
            seed=3,
            checkpoints=checkpoints,
        )


@dataclass(frozen=True)
class Rule:
    """An optimizer of torch with its options."""

    optimizer: type[torch.optim.Optimizer]
    options: dict


_SGD, _RMS = {"lr": 0.2}, {"lr": 0.02, "alpha": 0.8, "eps": 1e-2}
_ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-2}
RULES = {
    "sgd": Rule(torch.optim.SGD, _SGD),
    "sgd decay": Rule(torch.optim.SGD, {**_SGD, "weight_decay": 0.05}),
    "momentum": Rule(torch.optim.SGD, {**_SGD, "momentum": 0.7}),
    "dampening": Rule(torch.optim.SGD, {**_SGD, "momentum": 0.7, "dampening": 0.4, "weight_decay": 0.05}),
    "nesterov": Rule(torch.optim.SGD, {**_SGD, "momentum": 0.7, "nesterov": True, "weight_decay": 0.05}),
    "adam": Rule(torch.optim.Adam, _ADAM),
    "adam decay": Rule(torch.optim.Adam, {**_ADAM, "weight_decay": 0.05}),
    "adamw": Rule(torch.optim.AdamW, {**_ADAM, "weight_decay": 0.1}),
    "rmsprop": Rule(torch.optim.RMSprop, _RMS),
    "rmsprop momentum": Rule(torch.optim.RMSprop, {**_RMS, "momentum": 0.6, "weight_decay": 0.05}),
    "rmsprop centered": Rule(torch.optim.RMSprop, {**_RMS, "centered": True}),
    "rmsprop centered momentum": Rule(torch.optim.RMSprop, {**_RMS, "centered": True, "momentum": 0.6}),
}

_MLP = Case(mlp, mlp_formula)
CASES = {
    "plain": _MLP,
    "clipped": replace(_MLP, weights=WEIGHTS, clip_norm=0.4),
    "groups": replace(_MLP, weights=WEIGHTS, frozen=("0.weight",), second_group=("2.bias", "4.weight")),
    "batchnorm": Case(batchnorm, batchnorm_formula, weights=WEIGHTS, clip_norm=0.8),
    "dropout": Case(dropout, dropout_formula, weights=WEIGHTS),
    "tied": Case(Tied, tied_formula, tokens, weights=WEIGHTS),
    "cnn": Case(cnn, cnn_formula, images, _REGRESSION, weights=WEIGHTS),
    "attention": Case(Attention, attention_formula, sequences, _REGRESSION, weights=WEIGHTS, clip_norm=0.8),
}
