"""Dataset distillation: few synthetic examples that train a model as well as many real ones do.

    w_{t+1} = w_t − h ∇_w (1/M) Σ_m ℓ(x̃_m, ỹ_m; w_t),   t < T,           min over x̃, log h, z of  mean_{w_0}  L(w_T; real data)

x̃_m   the M synthetic inputs, learned; they begin as noise as wide as the real inputs, or as real examples;
ỹ_m   their labels: softmax(z_m) where real labels are classes, z_m itself where targets are numbers; learned;
h     the learning rate they are trained with, learned on a logarithmic scale;
w_0   a start, by default another one at each outer step, so that the data do not only suit one.

The derivative goes exactly through all T steps (`meta_train`). With ``start="warm"`` the model goes on from where the last
outer step left it: that costs less, ends about as low, and gives data that are worthless to any other model, since what was
learned is in its parameters. So the result is judged by `DistilledData.audit`, which trains new models on it.

Assumptions: every step trains on all M examples by plain gradient descent; the data are meant to be used that way: for T steps,
at the rate that was found, by models that start as those of ``initialise`` do. Elsewhere they lose.
Cost: an outer step is T steps on M examples, a pass over the real data forward and backward, and T steps back, at two to four
times the price of a step each. Memory: one graph of the pass over the real data.

References: Maclaurin, Duvenaud, Adams (2015), "Gradient-based hyperparameter optimization through reversible learning", section
3.3; Wang, Zhu, Torralba, Efros (2018), "Dataset distillation", algorithm 1 (random starts, learned rate); Bohdal, Yang,
Hospedales (2020), "Flexible dataset distillation" (learned labels); Vicol, Lorraine, Pedregosa, Duvenaud, Grosse (2022), "On
implicit bias in overparameterized bilevel optimization", section 5 (warm starts).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd.adjoint import Outcome
from retrograd.errors import InputError
from retrograd.hypergradients.distilled_data import DistilledData, recorded_on
from retrograd.hypergradients.hypergradient import Method
from retrograd.hypergradients.meta_training import meta_train
from retrograd.task import Classification, Meta, Task
from retrograd.trajectory.starts import Initialise, fresh_model, fresh_start

_SURE = 3.0  # logit of the class that a synthetic example begins with: .7 of its label, with 10 classes


def distil_dataset(
    initialise: Initialise,
    data: tuple[Tensor, Tensor],
    task: Task | None = None,
    *,
    size: int = 10,
    steps: int = 20,
    learning_rate: float = 0.1,
    learn_rate: bool = True,
    begin: Literal["noise", "examples"] = "noise",
    starts: int | None = None,
    outer_steps: int = 150,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    start: Literal["cold", "warm"] = "cold",
    method: Method | None = None,
    seed: int = 0,
    **options: Any,
) -> DistilledData:
    """Distil a data set into few examples.

    Args:
        initialise: makes a model from a number, with torch's global generator seeded by it.
        data: the real examples, inputs and labels: classes as integers, or targets as numbers.
        task: what is trained; its losses have to take labels as distributions. `Classification` if not given.
        size: M, the number of synthetic examples.
        steps: T, training steps on them.
        learning_rate: h at first.
        learn_rate: whether h is learned, too; `FixedPoint` can't.
        begin: what the inputs are at first: noise, or real examples. Classes come in turn.
        starts: how many starts take turns; a new one at each outer step if not given. A warm start has one.
        outer_steps: changes of the synthetic data.
        optimizer: of the synthetic data; Adam at .02 if not given.
        start: ``"cold"`` or ``"warm"``, see above.
        method: how hypergradients are obtained; exact unrolling if not given.
        seed: of the starts and of what the data are at first.
        options: more keywords of `meta_train`: ``validation``, ``patience``, ``penalty``, ``folder``.

    Raises:
        InputError: arguments contradict each other.
    """
    task = task or Classification()
    inputs, labels = data
    if size < 1 or steps < 1 or (starts is not None and starts < 1):
        raise InputError(f"size, steps and starts must be at least 1, got {size}, {steps} and {starts}.")
    classes = not labels.is_floating_point()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)
    if classes:
        turns = [cycle(rows[labels[rows] == kind].tolist()) for kind in labels.unique()]
        rows = torch.tensor([next(turns[place % len(turns)]) for place in range(size)])
    rows = rows[:size]
    noise = inputs.std() * torch.randn(size, *inputs.shape[1:], generator=generator, dtype=inputs.dtype)
    count = int(labels.max()) + 1 if classes else 0
    targets = _SURE * F.one_hot(labels[rows], count).to(inputs.dtype) if classes else labels[rows]
    synthetic = _Synthetic(noise if begin == "noise" else inputs[rows], targets, classes)
    rows = torch.arange(size)
    run = recorded_on(fresh_model(initialise, seed), rows, _OnSynthetic(task), learning_rate, steps, meta=synthetic)
    fresh = lambda number: {"initial": fresh_start(run, initialise, seed + (number % starts if starts else number))}  # noqa: E731
    found = meta_train(
        run,
        Outcome(lambda model: task.losses(model, data).mean()),
        ("meta", "learning_rate") if learn_rate else "meta",
        optimizer=optimizer or (lambda leaves: torch.optim.Adam(leaves, lr=0.02)),
        steps=outer_steps,
        start=start,
        method=method,
        vary=fresh if start == "cold" else None,
        **options,
    )
    rate = found.values["learning_rate"].exp().item() if learn_rate else learning_rate
    made = _Synthetic(found.meta["inputs"], found.meta["labels"], classes)
    return DistilledData(made.inputs.detach(), made(slice(None))[1].detach(), rate, steps, found, initialise)


class _Synthetic(nn.Module):
    """The synthetic data, as a meta-module that is asked for its rows."""

    def __init__(self, inputs: Tensor, labels: Tensor, soft: bool):
        super().__init__()
        self.inputs, self.labels, self.soft = nn.Parameter(inputs.clone()), nn.Parameter(labels.clone()), soft

    def forward(self, rows: Any) -> tuple[Tensor, Tensor]:
        labels = self.labels[rows]
        return self.inputs[rows], labels.softmax(-1) if self.soft else labels


@dataclass(frozen=True)
class _OnSynthetic:
    """A task on the rows of a meta-module's data."""

    task: Task

    def losses(self, model: nn.Module, batch: Any, meta: Meta) -> Tensor:
        return self.task.losses(model, meta(batch))

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.measurements(model, batch)
