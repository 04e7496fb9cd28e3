"""Where training should begin: exact gradients by the common start of many tasks.

One start for all tasks (MAML), each trained on its own for T steps:

    θ_i = training on task i from θ_0,      g = (1/N) Σ_i dL_i(θ_i) / dθ_0 = (1/N) Σ_i λ_0^i          (`Unrolled`, exact)

λ_0^i  costates of task i's first state; the first-order variant (FOMAML) takes ∇L_i(θ_i) in their place.

All tasks are trained in one recorded run: each parameter gets an axis ``task`` in front, an example is a task, and N times the
learning rate undoes the mean over them. So many small tasks cost what one of their size would. Assumptions: tasks have equally
many examples, the model has no buffers that training moves and draws no random numbers. Training that has settled has forgotten
its start, and the derivative by it is zero: learn through few steps, use many.

Cost: a batch of tasks costs T steps and, for the exact gradient, T steps back at two to four times the price. Memory: T states.

Reference: Finn, Abbeel, Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks" (equation 1, and
first order in section 5.2).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrograd.adjoint import Outcome
from retrograd.errors import InputError, NonFinite
from retrograd.hypergradients.hypergradient import hypergradient
from retrograd.params import Params
from retrograd.progress import track
from retrograd.task import BoundModel, Regression, Task
from retrograd.trajectory import All, Examples, Trajectory, record

Data = tuple[Tensor, ...]
"""Examples of many tasks, [task, example, …]: inputs and targets."""


def adapt(
    model: nn.Module, support: Data, task: Task | None = None, *, steps: int = 5, learning_rate: float = 0.01
) -> Trajectory:
    """Train a copy of ``model`` on each task, all from its present parameters, and return one run of all.

    Args:
        model: the model of one task; it stays as it is.
        support: what each task is trained on, in every step on all of it.
        task: losses; `Regression` if not given.
        steps: of gradient descent.
        learning_rate: of each task.
    """
    count = len(support[0])
    if steps < 1 or count < 1:
        raise InputError(f"there must be at least one step and one task, got {steps} and {count}.")
    stacked = _Tasks(model, count)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=learning_rate * count)  # noqa: E731 the loss is a mean over tasks
    order = torch.arange(count).repeat(steps, 1)
    return record(stacked, support, _EachTask(task or Regression()), optimizer=sgd, order=order, checkpoints=All())


def initialisation_gradient(
    run: Trajectory, query: Data, *, order: Literal["exact", "first"] = "exact"
) -> tuple[Params, Tensor]:
    """Return the derivative of the mean loss after training by the common start, and that loss.

    Args:
        run: what `adapt` returned (or a rerun of it from equal starts).
        query: what each task is judged on.
        order: ``"first"`` leaves out how the trained parameters depend on the start.
    """
    asked = Outcome.of(query)  # measurements are the losses
    if order == "exact":
        found = hypergradient(run, asked, "initial_params")
        rows, loss = {name: leaf[0] for name, leaf in found["initial_params"].items()}, found.outcome[0]
    else:
        final = run.final_state
        rows = {name: leaf[0] for name, leaf in asked.gradients(run, final).params.items()}
        loss = asked.values(run.update_map, final)[0].detach()
    return {name.replace("/", "."): leaf.sum(0) for name, leaf in rows.items()}, loss


def meta_initialise(
    model: nn.Module,
    sample: Callable[[int], tuple[Data, Data]],
    task: Task | None = None,
    *,
    steps: int = 5,
    learning_rate: float = 0.01,
    outer_steps: int = 600,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    order: Literal["exact", "first"] = "exact",
) -> list[float]:
    """Learn the parameters from which tasks are learned in few steps; ``model`` holds them in the end.

    Args:
        model: the model of one task.
        sample: gives support and query of some tasks for an outer step, always equally many.
        task: losses; `Regression` if not given.
        steps: of training on each task.
        learning_rate: of that training.
        outer_steps: changes of the start.
        optimizer: of the start; Adam at .003 if not given.
        order: ``"exact"`` or ``"first"``, see above.

    Returns:
        The mean loss after training at each outer step.

    Raises:
        NonFinite: training on a task diverged.
    """
    leaves = dict(model.named_parameters())
    outer = (optimizer or (lambda own: torch.optim.Adam(own, lr=0.003)))(list(leaves.values()))
    run, history = None, []
    for number in track(range(outer_steps), "learning to initialise"):
        support, query = sample(number)
        if run is None:
            run = adapt(model, support, task, steps=steps, learning_rate=learning_rate)
        else:
            again = {
                name: leaves[name.replace("/", ".")].detach().expand_as(leaf) for name, leaf in run.state(0).params.items()
            }
            start = replace(run.state(0), params={name: leaf.clone() for name, leaf in again.items()})
            run = run.rerun(examples=Examples(support), initial=start)
        gradient, loss = initialisation_gradient(run, query, order=order)
        history.append(loss.item())
        for name, leaf in gradient.items():
            if not torch.isfinite(leaf).all():
                raise NonFinite(f"the derivative by {name} became non-finite at outer step {number}; lower learning_rate.")
            leaves[name].grad = leaf
        outer.step()
        outer.zero_grad()
    return history


class _Tasks(nn.Module):
    """Copies of a model, one for each task: its parameters with an axis ``task`` in front."""

    def __init__(self, model: nn.Module, count: int):
        super().__init__()
        self._model = (BoundModel(model),)  # in a tuple: its own parameters are not trained
        for name, leaf in model.named_parameters():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(leaf.detach().expand(count, *leaf.shape).clone()))

    def forward(self, function: Callable[..., Tensor], batch: Data) -> Tensor:
        params = {name.replace("/", "."): leaf for name, leaf in self.named_parameters()}
        one = lambda own, *columns: self._model[0](function, dict(own), columns)  # noqa: E731
        return torch.func.vmap(one)(params, *batch)


class _EachTask:
    """The mean loss of each task, as that of an example."""

    def __init__(self, task: Task):
        self.task = task

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return model(lambda own, columns: self.task.losses(own, columns).mean(), batch)

    measurements = losses
