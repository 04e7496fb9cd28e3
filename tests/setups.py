"""Training whose inputs are differentiated by: a case, what is trained instead of its own task, and a meta-module beside it.

As a module has its *formula* in ``cases.py``, a task has its *objective* here, the loss of a step in plain arithmetic:

    objective(predict, inputs, targets, weights, phi, step) -> (loss, buffers after the pass)

with ``predict`` mapping inputs to (outputs, buffers), and ``phi`` the meta-parameters. Classes are given as distributions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Regression, Trajectory, record
from retrograd.trajectory import Schedule
from tests.cases import BATCH, CASES, EPOCHS, WEIGHTS, Case, Rule, linear, mlp, mlp_formula, normal, tabular

Predict = Callable[[Tensor], tuple[Tensor, dict]]
Objective = Callable[[Predict, Tensor, Tensor, Tensor, dict, int], tuple[Tensor, dict]]
CLASSES = 3


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (outputs - torch.log(torch.exp(outputs).sum(1, keepdim=True)))).sum(1)


def cross_entropy(predict, inputs, targets, weights, phi, step):
    outputs, buffers = predict(inputs)
    return (weights * cross_entropies(outputs, targets)).sum() / len(weights), buffers


def squared_error(predict, inputs, targets, weights, phi, step):
    outputs, buffers = predict(inputs)
    return (weights * ((outputs - targets) ** 2).sum(1) / outputs.shape[1]).sum() / len(weights), buffers


# ---------------------------------------------------------------------------------------------------------------------
# Meta-modules, the tasks that use them, and their objectives


class Commentary(nn.Module):
    """Moves the inputs and weighs the losses, at each step a little differently; one parameter and a buffer are not learned."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        self.gate = nn.Linear(3, 1).double()
        self.pace = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64), requires_grad=False)
        self.register_buffer("offset", torch.tensor(0.1, dtype=torch.float64))
        with torch.no_grad():
            self.gate.weight.copy_(torch.tensor([[0.5, -0.4, 0.2]]))
            self.gate.bias.fill_(0.1)

    def forward(self, inputs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        weights = self.scale * torch.sigmoid(self.gate(inputs)[:, 0] + self.pace * step / 4 + self.offset)
        return inputs + self.shift / (1 + step), weights


@dataclass(frozen=True)
class Commented:
    """Classification with commented examples; ``still`` comments say the same at each step."""

    still: bool = False

    def losses(self, model: nn.Module, batch: Any, meta: Any) -> Tensor:
        inputs, labels = batch
        moved, weights = meta(inputs, 0 if self.still else meta.step)
        return weights * F.cross_entropy(model(moved), labels, reduction="none")

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return Classification().measurements(model, batch)


def commented(predict, inputs, targets, weights, phi, step):
    gates = inputs @ phi["gate.weight"].T + phi["gate.bias"]
    own = 1.5 / (1 + torch.exp(-gates[:, 0] - phi["pace"] * step / 4 - 0.1))
    outputs, buffers = predict(inputs + phi["shift"] / (1 + step))
    return (weights * own * cross_entropies(outputs, targets)).sum() / len(weights), buffers


def commented_alike(predict, inputs, targets, weights, phi, step):
    return commented(predict, inputs, targets, weights, phi, 0)


class Pull(nn.Module):
    """How strongly the outputs of a batch repel each other; falls off with the steps."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64))

    def forward(self, step: int) -> Tensor:
        return self.strength * 0.8**step


class Repelled:
    """Regression on what is left of outputs when a share of their weighted mean is taken off: the examples are coupled."""

    def loss(self, model: nn.Module, batch: Any, weights: Tensor, meta: Any) -> Tensor:
        inputs, targets = batch
        outputs = model(inputs)
        mean = (weights[:, None] * outputs).sum(0) / weights.sum()
        return (weights[:, None] * (outputs - meta(meta.step) * mean - targets).square()).mean()

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return Regression("prediction").measurements(model, batch)


def repelled(predict, inputs, targets, weights, phi, step):
    outputs, buffers = predict(inputs)
    mean = torch.einsum("b,bo->o", weights, outputs) / weights.sum()
    errors = ((outputs - phi["strength"] * 0.8**step * mean - targets) ** 2).sum(1)
    return (weights * errors).sum() / outputs.numel(), buffers


# ---------------------------------------------------------------------------------------------------------------------
# A model with all that a state can have


def rich() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5, momentum=0.3), nn.Dropout(0.2), nn.Linear(5, 3))


def normalised(
    hidden: Tensor, params: dict, buffers: dict, name: str, training: bool, share: float = 0.3
) -> tuple[Tensor, dict]:
    mean, variance = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    if training:
        size = len(hidden)
        own_mean = hidden.sum(0) / size
        own_variance = ((hidden - own_mean) ** 2).sum(0) / size
        buffers = {
            f"{name}.running_mean": (1 - share) * mean + share * own_mean,
            f"{name}.running_var": (1 - share) * variance + share * own_variance * size / (size - 1),
        }
        mean, variance = own_mean, own_variance
    return (hidden - mean) / torch.sqrt(variance + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"], buffers


def rich_formula(params, buffers, inputs, draw):
    hidden, buffers = normalised(torch.tanh(linear(params, "0", inputs)), params, buffers, "2", draw is not None)
    if draw is not None:
        hidden = hidden * torch.empty_like(hidden).bernoulli_(0.8, generator=draw) / 0.8
    return linear(params, "4", hidden), buffers


def values(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(count, 3, seed=seed), normal(count, 3, seed=seed + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Setups


@dataclass(frozen=True)
class Setup:
    """What is trained, and by what."""

    case: Case
    objective: Objective = cross_entropy
    task: Any = None  # the case's own
    meta: Callable[[], nn.Module] | None = None
    soft_labels: bool = False  # classes are given as distributions
    rates: tuple[float, ...] | None = None  # factors on the learning rate, one a step
    epochs: int = EPOCHS
    batch: int = BATCH

    @property
    def examples(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.case.examples
        return (inputs, 0.1 / CLASSES + 0.9 * F.one_hot(targets, CLASSES).double()) if self.soft_labels else (inputs, targets)

    def record(
        self,
        rule: Rule,
        checkpoints: Schedule | None = None,
        start: Mapping[str, Tensor] | None = None,
        still: tuple[str, ...] = (),
        **options: Any,
    ) -> Trajectory:
        """Record a run; ``start`` overwrites parameters and buffers first, and ``still`` ones have a learning rate of 0."""
        model, optimizer = self.case.model(), cast(Any, rule.optimizer)
        model.load_state_dict(dict(start or {}), strict=False)
        groups = [
            {"params": [model.get_parameter(name) for name in names if name not in still], **own}
            for names, own in self.case.groups(rule)
        ]
        if still:
            groups.append({"params": [model.get_parameter(name) for name in still], **rule.options, "lr": 0.0})
        steps = self.epochs * -(-len(self.examples[0]) // self.batch)
        rates = (
            None if self.rates is None else [rule.options["lr"] * self.rates[step % len(self.rates)] for step in range(steps)]
        )
        return record(
            model,
            self.examples,
            self.case.task if self.task is None else self.task,
            optimizer=optimizer(groups),
            epochs=self.epochs,
            batch_size=self.batch,
            learning_rates=rates,
            clip_norm=self.case.clip_norm,
            weights=self.case.weights,
            meta=None if self.meta is None else self.meta(),
            seed=3,
            checkpoints=checkpoints,
            **options,
        )


_MLP = Case(mlp, mlp_formula)
_RICH = Case(rich, rich_formula, weights=WEIGHTS, clip_norm=0.8, second_group=("2.weight", "4.bias"))
_SLOWER = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SETUPS = {
    "plain": Setup(_MLP, rates=_SLOWER),
    "clipped": Setup(CASES["clipped"]),
    "groups": Setup(CASES["groups"]),
    "batchnorm": Setup(CASES["batchnorm"]),
    "dropout": Setup(CASES["dropout"]),
    "regression": Setup(replace(_MLP, data=values, task=Regression("prediction"), weights=WEIGHTS), squared_error),
    "meta": Setup(replace(_MLP, data=tabular), commented, Commented(), Commentary, soft_labels=True, rates=_SLOWER),
    "coupled": Setup(
        replace(_MLP, data=values, task=Regression("prediction"), weights=WEIGHTS, clip_norm=0.5), repelled, Repelled(), Pull
    ),
    "everything": Setup(_RICH, commented, Commented(), Commentary, soft_labels=True),
}
