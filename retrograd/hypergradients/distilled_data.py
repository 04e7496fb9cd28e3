"""What a dataset distillation gives: synthetic examples with the learning rate and number of steps that they are meant for."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.adjoint import Outcome
from retrograd.errors import CorruptRecord, InputError
from retrograd.files import read_tensors, write_tensors
from retrograd.hypergradients.audit import Audit, audit
from retrograd.hypergradients.meta_training import MetaTraining
from retrograd.task import Classification, Task
from retrograd.trajectory import All, Trajectory, record
from retrograd.trajectory.starts import Initialise, fresh_model, fresh_start

FORMAT = 1
_AUDITED = 1 << 20  # number of the first start of an audit: none that was trained with


@dataclass(frozen=True)
class DistilledData:
    """Synthetic examples, and how to train on them.

    Attributes:
        inputs: x̃, [example, …].
        labels: ỹ, rows that sum to 1, [example, class], or numbers as the targets of the real data.
        learning_rate: h.
        steps: T.
        found: the meta-training that found them; None when they were read from a file.
        initialise: what made the models that they were found with; likewise.
    """

    inputs: Tensor
    labels: Tensor
    learning_rate: float
    steps: int
    found: MetaTraining | None = field(default=None, repr=False)
    initialise: Initialise | None = field(default=None, repr=False)

    def train(self, model: nn.Module, task: Task | None = None, *, steps: int | None = None) -> Trajectory:
        """Train ``model`` on them in place, for ``steps`` (T if not given), and return the recorded run."""
        steps = self.steps if steps is None else steps
        return recorded_on(model, (self.inputs, self.labels), task or Classification(), self.learning_rate, steps)

    def save(self, path: str | PathLike[str]) -> None:
        """Write them to one safetensors file, with a digest of their content."""
        about = {"format": FORMAT, "learning_rate": self.learning_rate, "steps": self.steps}
        write_tensors(Path(path), {"inputs": self.inputs, "labels": self.labels}, about)

    @staticmethod
    def open(path: str | PathLike[str]) -> "DistilledData":
        """Read what `save` wrote.

        Raises:
            CorruptRecord: the file is torn, altered, or no such file.
        """
        tensors, about = read_tensors(Path(path))
        if about.get("format") != FORMAT or tensors.keys() != {"inputs", "labels"}:
            raise CorruptRecord(f"{path} does not hold distilled data of format {FORMAT}.")
        return DistilledData(tensors["inputs"], tensors["labels"], float(about["learning_rate"]), int(about["steps"]))

    def audit(self, data: Any, *, repeats: int = 4, steps: int | None = None, seed: int = 0) -> Audit:
        """Train new models on them and on controls, from starts that were not used before (see `retrograd.audit`).

        Args:
            data: real examples ``(inputs, labels)`` that were not distilled. What is asked of the trained models is their
                accuracy where labels are classes, else the mean measurement of the task (for `Regression` an error).
            repeats: how many starts.
            steps: how long to train; T if not given.
            seed: of starts and permutations.

        Raises:
            InputError: they were read from a file, so that nothing is known of how they were found.
        """
        if self.found is None or self.initialise is None:
            raise InputError(
                "an audit needs the meta-training that found the data, which a file does not hold: audit, then save."
            )
        recipe, make = self.found.recipe, self.initialise
        assert isinstance(recipe, Trajectory)
        if steps is not None and steps != self.steps:
            update_map = recipe.update_map
            meta, rows = update_map.meta_module, torch.arange(len(self.inputs))
            recipe = recorded_on(fresh_model(make, 0), rows, update_map.task, self.learning_rate, steps, meta=meta)
        classes = not data[1].is_floating_point()
        vary = lambda number: {"initial": fresh_start(recipe, make, _AUDITED * (1 + seed) + number)}  # noqa: E731
        options = {"recipe": recipe, "repeats": repeats, "vary": vary, "larger_is_better": classes, "seed": seed}
        return audit(self.found, Outcome(lambda model: _accuracy(model, data)) if classes else data, **options)


def recorded_on(model: nn.Module, data: Any, task: Any, rate: float, steps: int, **options: Any) -> Trajectory:
    """Record plain gradient descent, every step on all examples."""
    size = len(data) if isinstance(data, Tensor) else len(data[0])
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=rate)  # noqa: E731
    order = torch.arange(size).repeat(steps, 1)
    return record(model, data, task, optimizer=sgd, order=order, checkpoints=All(), **options)


def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]).argmax(-1) == data[1]).to(data[0].dtype).mean()
