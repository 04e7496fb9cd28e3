"""Distillation on a subset: the model that saw all data teaches the one that trains on what is left.

For an example with input x and label y, a teacher with logits t(x), and a student with logits s(x):

    ℓ = (1 − a) CE(s(x), y) + a τ² KL(softmax(t(x) / τ) ‖ softmax(s(x) / τ))

a    the `weight` of distillation, from 0 (labels only) to 1 (teacher only); no unit
τ    the `temperature`: above 1 it brings out what the teacher thinks of the wrong classes; τ² keeps gradients of one size
ℓ    in nats

Both share one forward pass, so random numbers (dropout) are those of plain training. The teacher's logits are taken once, in
evaluation mode, and are constants: no gradient goes to them.

Why it helps where data were pruned: the labels of a small subset say little, and the teacher's logits carry what it learned
from the examples that are gone. For ridge regression this is a theorem (theorem 1 of the paper): with kept data X_f, y_f,

    θ_s = (X_f X_fᵀ + λI)⁻¹ X_f [a X_fᵀ θ_t + (1 − a) y_f]

the student's error falls as the share of the data that the teacher θ_t was trained on grows. So a teacher of all data beats one
of the subset alone, and the latter may well do harm (``tests/test_distillation.py`` has both signs in closed form).

Assumes that the teacher is good, and has seen inputs like these. It stops helping, and may cost, where the subset is large, as
labels then say more than the teacher: `suggested_weight` falls with the share that is kept. Cost: one pass of the teacher over
the data, and next to nothing in training. Memory: classes × examples numbers for the logits.

References: Ben-Baruch, Botach, Kviatkovsky, Aggarwal, Medioni (2025), "Distilling the knowledge in data pruning", ICML,
arXiv 2403.07854; Hinton, Vinyals, Dean (2015), "Distilling the knowledge in a neural network" (the loss and its τ²).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.errors import InputError
from retrograd.task import Classification, Task
from retrograd.trajectory import All, Examples, MemoryCheckpoints, TrainingState, Trajectory, UpdateMap
from retrograd.trajectory.trajectory import to_device

_AT_ONCE = 512  # examples of one forward pass; the result does not depend on it


@dataclass(frozen=True)
class Distillation:
    """Classification with a teacher; its training examples are ``(inputs, labels, teacher_logits)``.

    Queries are ``(inputs, labels)``, as those of `base`.

    Args:
        weight: a, the share of the teacher in the loss, 0 ≤ a ≤ 1.
        temperature: τ > 0.
        base: the task without teacher: its losses are the label's part, its measurements are what is asked.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = model.weight.data.zero_()                               # says ½ and ½
    >>> batch = (torch.tensor([[1.0]]), torch.tensor([0]), torch.tensor([[0.0, 0.0]]))
    >>> round(Distillation(0.25).losses(model, batch).item(), 4)    # the teacher says so, too: ¾ log 2 is left
    0.5199
    """

    weight: float
    temperature: float = 4.0
    base: Task = field(default_factory=Classification)

    citation: ClassVar[str] = """@inproceedings{benbaruch2025distilling,
  title = {Distilling the Knowledge in Data Pruning},
  author = {Ben-Baruch, Emanuel and Botach, Adam and Kviatkovsky, Igor and Aggarwal, Manoj and Medioni, G{\\'e}rard},
  booktitle = {International Conference on Machine Learning}, year = {2025}
}"""

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight is the teacher's share of the loss, 0 <= weight <= 1, got {self.weight}.")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}.")

    def losses(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """Return the loss of each example, in nats."""
        if not isinstance(batch, tuple | list) or len(batch) != 3:
            raise InputError(
                "distillation trains on (inputs, labels, teacher_logits); make such examples with with_teacher(run, ...)."
            )
        inputs, labels, teacher = batch
        logits = model(inputs)
        labelled = self.base.losses(_Computed(logits), (inputs, labels))
        theirs, own = (F.log_softmax(each / self.temperature, dim=-1) for each in (teacher.detach(), logits))
        divergence = (theirs.exp() * (theirs - own)).sum(-1)
        return (1 - self.weight) * labelled + self.weight * self.temperature**2 * divergence

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the base task's measurement of each query; a teacher's logits play no part."""
        return self.base.measurements(model, tuple(batch[:2]))


class _Computed(nn.Module):
    """Stands for a model whose outputs are there already: a second forward pass would cost, and draw other dropout masks."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self._logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self._logits


def with_teacher(run: Trajectory, teacher: Trajectory | None = None, *, weight: float, temperature: float = 4.0) -> Trajectory:
    """Return the training of a student: ``run`` once more, with a teacher's logits beside each label.

    Start, order of the batches, hyperparameters and random numbers are those of ``run``. Nothing is trained yet: ask for the
    student's ``final_state``, or give it to `retrain` to train students on subsets.

    Args:
        run: a recorded run of a `Classification` on ``(inputs, labels)``.
        teacher: the run whose final model teaches; ``run`` itself, which saw all data, if not given. It may be another model.
        weight: share of the teacher in the loss, 0 to 1; see `suggested_weight`.
        temperature: of the distillation.

    Returns:
        A trajectory with only its first state stored. Examples keep their ids, and the teacher is one of its parents.

    Raises:
        InputError: the task is no classification, the data are not ``(inputs, labels)``, or the teacher's classes are others.
    """
    teacher, step = teacher or run, run.update_map
    if not isinstance(step.task, Classification):
        raise InputError(
            f"distillation needs a run of Classification, got {type(step.task).__name__}: its loss compares class "
            "probabilities. For another task write one whose examples hold the teacher's outputs."
        )
    inputs, labels = inputs_and_labels(run)
    logits = outputs(teacher, teacher.final_state, inputs)
    own = outputs(run, run.state(0), inputs[:1])
    if logits.shape[1:] != own.shape[1:]:
        raise InputError(
            f"the teacher has outputs of shape {tuple(logits.shape[1:])} and the student of shape {tuple(own.shape[1:])}. Both "
            "must have one logit for each of the same classes."
        )
    if not logits.isfinite().all():
        raise InputError("the teacher's logits are not all finite; distillation needs a teacher whose training went well.")
    checkpoints = MemoryCheckpoints()
    checkpoints.save(run.state(0))
    return Trajectory(
        UpdateMap(
            step.model,
            Distillation(weight, temperature, step.task),
            step.rule,
            step.groups,
            step.clip_norm,
            step.evaluation_modules,
        ),
        Examples((inputs, labels, logits.to(own.dtype)), run.examples.ids),
        [replace(record, loss=None, witness=None) for record in run.records],
        checkpoints,
        All(),
        tolerance=run.tolerance,
        counterfactual=run.counterfactual,
        parents=(*run.parents, teacher),
    )


def suggested_weight(keep: float) -> float:
    """Return the weight of distillation for a share of the data: a = 1.25 − 2 f, but at least ¼ and at most 1.

    Fitted on digits (``benchmarks/pruning.py``, which also checks it on other data): in the mean over four rankings the best
    weights for shares of .03, .06, .12, .25 and .5 are 1, 1, 1, .75 and .25. Little depends on it: any teacher is most of the
    gain where little is kept, and where half is kept, weights differ by a point at most. A poor teacher deserves less.

    Args:
        keep: share of the examples that is kept, 0 < keep <= 1.

    >>> suggested_weight(0.25), suggested_weight(0.05), suggested_weight(0.9)
    (0.75, 1.0, 0.25)
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of examples that stays, 0 < keep <= 1, got {keep}.")
    return min(1.0, max(0.25, 1.25 - 2 * keep))


def inputs_and_labels(run: Trajectory) -> tuple[Tensor, Tensor]:
    """Return the run's training data, in the order of its example ids.

    Raises:
        InputError: they are not a tensor of inputs and a vector of class indices.
    """
    data = run.examples.batch(run.examples.ids)
    right = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(column, Tensor) for column in data)
    if not right or data[1].dim() != 1 or data[1].is_floating_point():
        raise InputError(
            "this needs training data that are (inputs, labels): a tensor with one row an example, and a vector of class "
            f"indices. Got {_kind(data)}."
        )
    return data[0], data[1]


def outputs(run: Trajectory, state: TrainingState, inputs: Tensor) -> Float[Tensor, "example ..."]:
    """Return the model's outputs at ``state`` in evaluation mode, as constants on the CPU."""
    model, tensors = run.update_map.model, {**state.params, **state.buffers}
    with _evaluating(model), torch.no_grad():
        parts = [
            torch.func.functional_call(model, tensors, (to_device(part, run.device),)).cpu() for part in inputs.split(_AT_ONCE)
        ]
    return torch.cat(parts)


@dataclass(frozen=True)
class _Losses:
    """Measures what `base` trains on."""

    base: Task

    def losses(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        return self.base.losses(model, batch)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        return self.base.losses(model, batch)


def asking_for_losses(student: Trajectory) -> Trajectory:
    """Let the measurements of a student be its base task's losses: queries have no teacher, so its own losses have no meaning.

    Args:
        student: what `with_teacher` returned; it is changed, as its update map belongs to it alone.
    """
    task = student.update_map.task
    assert isinstance(task, Distillation)
    student.update_map.task = replace(task, base=_Losses(task.base))
    return student


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _kind(data: Any) -> str:
    if isinstance(data, tuple | list):
        return f"{len(data)} columns: " + ", ".join(_kind(column) for column in data)
    return f"{data.dtype} of shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
