"""Training with features that stand still, in closed form: what is learnt when, and when to stop (Jacot et al. 2018).

For squared loss L = Σ_i ‖f(x_i) − y_i‖² / (N C) and a kernel K that stays as it is, with R = (2/(N C)) K = V diag(κ) Vᵀ,

    gradient flow       f_t = y + e^{−η R t} (f_0 − y)
    gradient descent    f_t = y + (I − η R)^t (f_0 − y)
    elsewhere           f_t(x*) = f_0(x*) + (2/(N C)) K(x*, X) V φ_t(κ) Vᵀ (y − f_0),    φ_t(κ) = (1 − (1 − ηκ)^t) / κ

f, y       outputs and targets of all N examples with their C components, one after the other [N C]; unit of the targets;
K          tangent kernel [N C, N C] (`retrograd.curvature.EmpiricalKernel`); η learning rate, t steps (of the flow: real);
2/(N C)    because the library's losses are means over components, and those of a step means over its examples;
κ, V       eigenvalues [1/η] and modes: along mode k the error falls by 1 − ηκ_k a step, alone. Its time constant, the steps to
           1/e, is −1 / log|1 − ηκ_k|: about 1/(ηκ_k).

φ_t is taken as −expm1(t log1p(−ηκ))/κ, which at κ → 0 is its limit ηt, where nothing is learnt. So stopping after t steps is a
filter on modes: those with ηκt ≫ 1 are fitted, the others are as they were; ridge regression with the weight 1/(ηt) is
nearly the same filter. Other losses have no closed form and are iterated, N C numbers for the state (`descend`).

Assumptions: whole batches, plain gradient descent at one rate, and a kernel that does not move; in networks of width m it
moves by O(m^(−1/2)) at worst, if outputs are O(1) whatever m is (``docs/tangent_kernel.md`` has measurements). Where it
fails: ηκ > 2 diverges, though the network may survive. Cost: (N C)³ once, then (N C)² a time. Memory: 2 (N C)² numbers.

References: Jacot, Gabriel, Hongler (2018), "Neural tangent kernel", section 5; Lee et al. (2019), "Wide neural networks of
any depth evolve as linear models under gradient descent", equations 8–11.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.curvature.tangent_kernel import EmpiricalKernel
from retrograd.errors import InputError, NonFinite
from retrograd.trajectory import Run, TrainingState
from retrograd.trajectory.trajectory import to_device


@dataclass(frozen=True)
class Modes:
    """The directions of outputs in which linearised training moves, each by itself, the fastest first.

    Attributes:
        rates: ηκ, the share of the error along the mode that a step removes, ``[mode]``.
        directions: V, ``[mode, example, out]``, of length 1.
        errors: how much of f_0 − y lies along each, ``[mode]``.
        time_constants: steps until the error along the mode has fallen to 1/e; infinite where it never does.
    """

    rates: Float[Tensor, " mode"]
    directions: Float[Tensor, "mode example out"]
    errors: Float[Tensor, " mode"]
    time_constants: Float[Tensor, " mode"]


@dataclass(frozen=True)
class EarlyStopping:
    """Losses along linearised training.

    Attributes:
        steps: when, ``[time]``.
        training: mean squared error on the training examples, ``[time]``.
        held_out: mean squared error on the others, ``[time]``.
        best: the step with the lowest error on the others.
    """

    steps: tuple[int, ...]
    training: Float[Tensor, " time"]
    held_out: Float[Tensor, " time"]
    best: int


class LinearisedTraining:
    """Gradient descent on squared loss with a kernel that does not move.

    Args:
        kernel: the tangent kernel, which gives K(x*, X) for other inputs.
        inputs: the training examples, as the kernel takes them.
        targets: y.
        learning_rate: η.
        gram: K of the training examples, if it is known.

    One weight: f = w x with K = x², so the error falls by the factor 1 − 2 η x² a step.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> training = LinearisedTraining.of(model, (torch.tensor([[2.0]]), torch.tensor([[3.0]])), learning_rate=0.1)
    >>> training.outputs(2).item(), 3 - 3 * (1 - 2 * 0.1 * 4) ** 2
    (2.88..., 2.88)
    """

    def __init__(
        self,
        kernel: EmpiricalKernel,
        inputs: Any,
        targets: Float[Tensor, "example out"],
        learning_rate: float,
        gram: Float[Tensor, "row row"] | None = None,
    ):
        start = kernel.outputs(inputs)
        if start.shape != targets.shape:
            raise InputError(
                f"outputs have shape {tuple(start.shape)} and targets {tuple(targets.shape)}. They must be equal; reshape the "
                "targets, for example targets[:, None]."
            )
        if not learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, got {learning_rate}.")
        self.kernel, self.inputs, self.targets, self.learning_rate = kernel, inputs, targets.to(start), learning_rate
        self.start, self.scale = start, 2 / targets.numel()
        gram = kernel.gram(inputs) if gram is None else gram
        values, basis = torch.linalg.eigh(gram)
        # A Gram matrix has no eigenvalue below 0 but by rounding, on which no mode is learnt or blown up.
        self._values, self._basis = values.clamp(min=0).flip(0), basis.flip(1)
        self._errors = self._basis.T @ (self.start - self.targets).flatten()
        self._rates = learning_rate * self.scale * self._values

    @staticmethod
    def of(
        source: Run | nn.Module,
        data: tuple[Any, Tensor] | None = None,
        *,
        learning_rate: float,
        state: TrainingState | None = None,
    ) -> "LinearisedTraining":
        """Linearise a model, or a run at one of its states (its first one, if not given).

        Args:
            source: a module, or a run whose task is a mean of squares over components, as `Regression`.
            data: (inputs, targets) to train on; those of the run if not given.
            learning_rate: η, summed up over momentum: η/(1 − μ).
            state: of the run.

        Raises:
            InputError: the run's losses are others than mean squares; see `descend`.
        """
        if isinstance(source, nn.Module):
            if data is None:
                raise InputError("a plain module needs data=(inputs, targets) to be trained on.")
            return LinearisedTraining(EmpiricalKernel.of(source), data[0], data[1], learning_rate)
        state = source.state(0) if state is None else state
        device = next(iter(state.params.values())).device
        batch = to_device(source.examples.batch(source.examples.ids) if data is None else data, device)
        kernel = EmpiricalKernel.of(source, state)
        outputs, task = kernel.outputs(batch), source.update_map.task
        targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if isinstance(targets, Tensor) and targets.dim() > 1 and targets[0].numel() == outputs.shape[1]:
            squares = (outputs - targets.flatten(1)).square().mean(1)
            if torch.allclose(source.update_map.losses(state, batch).detach(), squares.to(outputs), rtol=1e-4, atol=1e-6):
                return LinearisedTraining(kernel, batch, targets.flatten(1), learning_rate)
        raise InputError(
            f"closed forms are those of squared errors, averaged over components, and {type(task).__name__} has other losses. "
            "Iterate with retrograd.dynamics.descend(gram, outputs, losses_of, …)."
        )

    # ------------------------------------------------------------------ closed forms

    def outputs(self, steps: int) -> Float[Tensor, "example out"]:
        """Return f_t of the training examples after ``steps`` steps of gradient descent."""
        return self._from(self._powers(_whole(steps)))

    def flow(self, steps: float | int) -> Float[Tensor, "example out"]:
        """Return f of the training examples under gradient flow, after the time η · ``steps``."""
        return self._from(torch.exp(-self._rates * steps))

    def predict(self, inputs: Any, steps: int) -> Float[Tensor, "query out"]:
        """Return f_t of other inputs after ``steps`` steps of gradient descent."""
        return self._elsewhere(self.kernel.outputs(inputs), self.kernel.gram(inputs, self.inputs), _whole(steps))

    @property
    def largest_learning_rate(self) -> float:
        """The rate from which on the fastest mode does not converge, 2/κ_1."""
        largest = float(self._values[0]) * self.scale
        return float("inf") if largest == 0 else 2 / largest

    def modes(self, count: int | None = None) -> Modes:
        """Return the modes, the fastest first.

        Args:
            count: how many; all if not given.
        """
        rates, errors = self._rates[:count], self._errors[:count]
        constants = -1 / torch.where(rates < 1, torch.log1p(-rates.clamp(max=0.5)), 0.0)
        constants = torch.where((rates > 0.5) & (rates < 2), -1 / (1 - rates).abs().log(), constants)
        constants = torch.where((rates == 0) | (rates >= 2), torch.inf, constants)
        directions = self._basis.T[:count].reshape(-1, *self.start.shape)
        return Modes(rates, directions, errors, constants)

    def early_stopping(self, data: tuple[Any, Tensor], steps: Sequence[int]) -> EarlyStopping:
        """Return errors on the training examples and on others along training, and where the latter is lowest.

        Args:
            data: (inputs, targets) of the others; inputs as the kernel takes them.
            steps: when to look.
        """
        if not steps:
            raise InputError("early_stopping needs the steps at which to look, as range(0, 1000, 10).")
        start, gram, targets = self.kernel.outputs(data[0]), self.kernel.gram(data[0], self.inputs), data[1]
        if start.shape != targets.shape:
            raise InputError(f"outputs have shape {tuple(start.shape)} and targets {tuple(targets.shape)}; they must be equal.")
        training = torch.stack([(self.outputs(step) - self.targets).square().mean() for step in steps])
        held_out = torch.stack([(self._elsewhere(start, gram, step) - targets.to(start)).square().mean() for step in steps])
        return EarlyStopping(tuple(steps), training, held_out, steps[int(held_out.argmin())])

    # ------------------------------------------------------------------ inside

    def _powers(self, steps: int) -> Tensor:
        """(1 − ηκ)^t."""
        return (1 - self._rates) ** steps

    def _from(self, factors: Tensor) -> Tensor:
        return self.targets + (self._basis @ (factors * self._errors)).view(self.targets.shape)

    def _elsewhere(self, start: Tensor, gram: Tensor, steps: int) -> Tensor:
        rates = self._rates
        slow = rates < 0.5
        learnt = torch.where(slow, -torch.expm1(steps * torch.log1p(-rates.clamp(max=0.5))), 1 - self._powers(steps))
        # φ_t(κ) · 2/(N C), with its limit where nothing is learnt: ηt · 2/(N C).
        small = self._values <= torch.finfo(rates.dtype).tiny
        phi = torch.where(small, self.learning_rate * self.scale * steps, learnt / self._values.where(~small, 1.0))
        return start - (gram @ (self._basis @ (phi * self._errors))).view(start.shape)


def descend(
    gram: Float[Tensor, "row row"],
    outputs: Float[Tensor, "example out"],
    losses_of: Callable[[Tensor], Tensor],
    learning_rate: float,
    steps: int,
    *,
    elsewhere: tuple[Float[Tensor, "other row"], Float[Tensor, "query out"]] | None = None,
) -> tuple[Float[Tensor, "time example out"], Float[Tensor, "time query out"] | None]:
    """Iterate gradient descent on the outputs, f ← f − η K ∂L/∂f with L the mean loss: for any loss.

    Args:
        gram: K of the training examples, ``[N C, N C]``.
        outputs: f_0.
        losses_of: maps outputs ``[example, out]`` to one loss for each example, as `SplitTask.losses_of` does, given a batch.
        learning_rate: η.
        steps: how many.
        elsewhere: K(x*, X) ``[M C, N C]`` and f_0(x*) of other inputs.

    Returns:
        f_0 … f_t of the training examples, and of the others if there are some.

    Raises:
        InputError: shapes do not fit, or a loss does not depend on the outputs.
        NonFinite: the rate is above what the kernel bears.

    >>> squares = lambda outputs: (outputs - 3).square().mean(1)
    >>> descend(torch.tensor([[4.0]]), torch.tensor([[0.0]]), squares, 0.1, 2)[0].flatten()
    tensor([0.0000, 2.4000, 2.8800])
    """
    if gram.shape != (outputs.numel(), outputs.numel()):
        raise InputError(f"outputs of shape {tuple(outputs.shape)} need a kernel of {outputs.numel()} rows, got {len(gram)}.")
    found, others = [outputs], None if elsewhere is None else [elsewhere[1]]
    for step in range(_whole(steps)):
        point = found[-1].detach().requires_grad_()
        with torch.enable_grad():
            losses = losses_of(point)
            if losses.shape != (len(outputs),) or not losses.requires_grad:
                raise InputError(
                    f"losses_of must give one loss for each of {len(outputs)} examples that depends on the outputs, got shape "
                    f"{tuple(losses.shape)}."
                )
            (grad,) = torch.autograd.grad(losses.mean(), point)
        found.append(found[-1] - learning_rate * (gram @ grad.flatten()).view(outputs.shape))
        if not bool(torch.isfinite(found[-1]).all()):
            raise NonFinite(
                f"descent on the outputs is no longer finite at step {step}: learning_rate={learning_rate} is more than the "
                "kernel bears. Give a smaller one."
            )
        if elsewhere is not None and others is not None:
            others.append(others[-1] - learning_rate * (elsewhere[0] @ grad.flatten()).view(elsewhere[1].shape))
    return torch.stack(found), None if others is None else torch.stack(others)


def _whole(steps: int) -> int:
    if steps < 0:
        raise InputError(f"steps is a number from 0 on, got {steps}.")
    return steps
