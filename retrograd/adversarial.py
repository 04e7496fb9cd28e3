"""Adversarial training: each step descends the loss of the worst inputs near the given ones (Madry et al. 2018).

    L = Σ_i w_i ℓ(θ, x_i + δ_i) / B,      δ_i ≈ argmax_{‖δ‖ ≤ c} ℓ(θ, x_i + δ)

    projected ascent    δ ← Π_c(δ + α g/‖g‖_2)  or  Π_c(δ + α sign g),    g = ∂ℓ/∂x at x + δ          "l2", "linf"
    closed form         δ = c u/‖u‖_2  or  c sign u,    u = Jᵀ r                                        steps=0

c          radius, in units of the inputs; α step_size, in the same; Π_c projects to the ball of radius c around x;
J, r       Jacobian of the outputs by x, and ∂ℓ/∂outputs. For a model that is linear in x with one output, or two classes, u has
           the same direction everywhere and the form is exact: labels ±1 give δ = −c y θ/‖θ‖, the loss ℓ(y θᵀx − c‖θ‖).

The maximisation is part of the step, like everything else in `losses`: a recorded run replays it, and derivatives of the run
go through it. With ``perturbation="differentiated"`` the step descends ℓ(θ, x + δ(θ)) as a function of θ, and ∂δ/∂θ counts in
that step and in its Jacobians. At an exact maximum its part in the step is 0 (Danskin's theorem), after a few iterations small.
With ``"constant"`` the step is the usual one, ∂ℓ/∂θ at the x + δ that was found; then Jacobians leave out how δ moves with θ,
and derivatives of the run are approximate. For "linf" the two are the same: δ is piecewise constant.

A radius that may change is asked of a meta-module: with ``radius=None`` it is ``meta(step)``, one number, so that schedules and
hypergradients by it come for free (`hypergradient(run, outcome, "meta")`).

Why: on separable data gradient descent turns to the maximum-margin direction at O(1/log T). With perturbations of radius
c(T) → γ, the margin, it does so at Õ(1/√T) (Li et al. 2020; see ``docs/adversarial_training.md``); `radius_for` gives c(T).

Assumptions: the loss of an example depends on its own input alone. The maximisation is in evaluation mode, as in TRADES:
without dropout, and running averages are not touched. Where it fails: at g = 0 no direction is the worst and δ stays; sign g
jumps where a component is 0, so finite differences across a jump see what no derivative does. Cost: a forward and a backward
pass for each of ``steps``; derivatives of the run through them twice to three times that. Memory: their activations, while a
step is differentiated.

References: Madry, Makelov, Schmidt, Tsipras, Vladu (2018), "Towards deep learning models resistant to adversarial attacks";
Li, Fang, Xu, Zhao (2020), "Implicit bias of gradient descent based adversarial training on separable data"; Zhang et al.
(2019), "Theoretically principled trade-off between robustness and accuracy" (TRADES).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retrograd.errors import InputError
from retrograd.task import Meta, SplitTask, Task
from retrograd.trajectory.kernels import twice_differentiable

_LINEAR = (nn.Linear, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class SignedClassification:
    """Labels ±1 and one output: losses e^{−m} or log(1 + e^{−m}) of the margin m = y f(x), which is also what is asked.

    Args:
        surrogate: ``"exponential"`` or ``"logistic"``.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> task, batch = SignedClassification(), (torch.tensor([[0.5]]), torch.tensor([-1.0]))
    >>> task.measurements(model, batch).item(), task.losses(model, batch).log().item()
    (-1.0, 1.0)
    """

    surrogate: Literal["exponential", "logistic"] = "exponential"

    def __post_init__(self):
        if self.surrogate not in ("exponential", "logistic"):
            raise InputError(f"surrogate must be 'exponential' or 'logistic', got {self.surrogate!r}.")

    def outputs(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch *axes"]:
        """Return f(x)."""
        return model(batch[0])

    def losses_of(self, outputs: Float[Tensor, "batch *axes"], batch: Any) -> Float[Tensor, " batch"]:
        """Return the loss of each example."""
        margins = self._margins(outputs, batch)
        return torch.exp(-margins) if self.surrogate == "exponential" else F.softplus(-margins)

    def losses(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """Return the loss of each example."""
        return self.losses_of(self.outputs(model, batch), batch)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the margin of each query."""
        return self._margins(self.outputs(model, batch), batch)

    def _margins(self, outputs: Tensor, batch: Any) -> Tensor:
        if outputs.numel() != len(outputs):
            raise InputError(f"SignedClassification needs one output an example, got shape {tuple(outputs.shape)}.")
        return outputs.flatten() * batch[1].to(outputs).flatten()


@dataclass(frozen=True)
class Adversarial:
    """A task whose losses are those of the worst inputs within a radius. Measurements stay those of the clean inputs.

    Args:
        task: whose losses; its batches are pairs (inputs, …), or dicts.
        radius: c, in units of the inputs; None if a meta-module gives it as ``meta(step)``.
        norm: ``"l2"`` or ``"linf"``, over all axes of an example.
        steps: iterations of projected gradient ascent; 0 for the closed form of models that are linear in their inputs.
        step_size: α; 2.5 c / steps if not given.
        random_start: begin at a random point of the ball, drawn from torch's global generator, which each step seeds; in
            training mode only.
        perturbation: whether δ is ``"differentiated"`` or a ``"constant"`` of the step (see the module).
        bounds: lowest and highest value that an input can have.
        key: of the inputs, in batches that are dicts.

    For f = 2x and y = 1 the worst x within .25 of 1 is .75, with the loss e^{−1.5}:

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> batch = (torch.tensor([[1.0]]), torch.tensor([1.0]))
    >>> for steps in (0, 3):
    ...     Adversarial(SignedClassification(), 0.25, steps=steps).losses(model, batch).log().item()
    -1.5
    -1.5
    """

    task: Task
    radius: float | None
    norm: Literal["l2", "linf"] = "l2"
    steps: int = 5
    step_size: float | None = None
    random_start: bool = False
    perturbation: Literal["differentiated", "constant"] = "differentiated"
    bounds: tuple[float, float] | None = None
    key: str = "inputs"

    def __post_init__(self):
        if self.norm not in ("l2", "linf"):
            raise InputError(f"norm must be 'l2' or 'linf', got {self.norm!r}.")
        if self.perturbation not in ("differentiated", "constant"):
            raise InputError(f"perturbation must be 'differentiated' or 'constant', got {self.perturbation!r}.")
        if self.radius is not None and not 0 <= self.radius < float("inf"):
            raise InputError(f"radius is a length from 0 on in units of the inputs, got {self.radius}.")
        if self.steps < 0 or (self.step_size is not None and not self.step_size > 0):
            raise InputError(f"steps is at least 0 and step_size above 0, got {self.steps} and {self.step_size}.")
        if self.steps == 0 and (self.random_start or self.step_size is not None or self.bounds is not None):
            raise InputError(
                "steps=0 is the closed form of linear models, which has no start, no step_size and no bounds; leave them out, "
                "or give steps=1 or more."
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds are the lowest and the highest value of an input, got {self.bounds}.")
        if not isinstance(self.task, Task):
            raise InputError(
                f"{type(self.task).__name__} has no losses(model, batch) for each example; adversarial inputs are those that "
                "raise their own example's loss, so losses that couple examples have none."
            )

    # ------------------------------------------------------------------ the task

    def losses(self, model: nn.Module, batch: Any, meta: Meta | None = None) -> Float[Tensor, " batch"]:
        """Return the loss of each example at its worst input."""
        return self.task.losses(model, self.perturbed(model, batch, self._radius(meta)))

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the task's measurements, of the inputs as they are."""
        return self.task.measurements(model, batch)

    def outputs(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch *axes"]:
        """Return the outputs at the worst inputs."""
        return self._split("outputs").outputs(model, self.perturbed(model, batch, self._radius(None)))

    def losses_of(self, outputs: Float[Tensor, "batch *axes"], batch: Any) -> Float[Tensor, " batch"]:
        """Return the task's losses of these outputs."""
        return self._split("losses_of").losses_of(outputs, batch)

    def perturbed(self, model: nn.Module, batch: Any, radius: float | Tensor | None = None) -> Any:
        """Return the batch with the worst inputs in the place of its own.

        Args:
            model: the module; its own mode does not matter to the search.
            batch: pairs (inputs, …) or dicts.
            radius: c; that of the task if not given.

        Raises:
            InputError: there are no floating-point inputs, no radius, or the closed form is not this model's.
        """
        radius = self._radius(None) if radius is None else radius
        inputs = self._inputs(batch)
        # Random numbers are drawn before the mode changes: only training draws them.
        delta = self._start(inputs, radius) if self.random_start and model.training else torch.zeros_like(inputs)
        with _evaluation(model):
            if self.steps == 0:
                delta = self._closed_form(model, batch, inputs, radius)
            for _ in range(self.steps):
                gradient = self._gradient(lambda point: self.task.losses(model, self._with(batch, point)), inputs + delta)
                size = 2.5 * radius / self.steps if self.step_size is None else self.step_size
                delta = self._project(delta + size * self._direction(gradient), radius)
                if self.bounds is not None:
                    delta = (inputs + delta).clamp(*self.bounds) - inputs
        return self._with(batch, inputs + (delta.detach() if self.perturbation == "constant" else delta))

    # ------------------------------------------------------------------ inside

    def _radius(self, meta: Meta | None) -> float | Tensor:
        if meta is None:
            if self.radius is None:
                raise InputError(
                    "radius=None leaves the radius to a meta-module: record(…, meta=module), called as module(step)."
                )
            return self.radius
        if self.radius is not None:
            raise InputError(f"the radius is given twice: as {self.radius}, and by the meta-module. Give radius=None.")
        found = meta(meta.step)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise InputError("the meta-module of adversarial training must return one number, the radius, for module(step).")
        return found.reshape(())

    def _split(self, method: str) -> SplitTask:
        if not isinstance(self.task, SplitTask):
            raise InputError(
                f"{type(self.task).__name__} has no {method}: Gauss-Newton matrices, and the closed form steps=0, ask for a "
                "task that is split at the model's outputs (see retrograd.task.SplitTask). Give it `outputs` and `losses_of`."
            )
        return self.task

    def _inputs(self, batch: Any) -> Tensor:
        inputs = batch[self.key] if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"adversarial training moves inputs, so they must be floating-point tensors, got {kind}.")
        return inputs

    def _with(self, batch: Any, inputs: Tensor) -> Any:
        if isinstance(batch, Mapping):
            return {**batch, self.key: inputs}
        return type(batch)((inputs, *batch[1:])) if isinstance(batch, tuple | list) else inputs

    def _gradient(self, losses: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
        # torch.func.grad, as torch.autograd.grad fails where the step itself is under torch.func.
        with _own_kernels():
            found = torch.func.grad(lambda inputs: losses(inputs).sum())(point)
        constant = self.norm == "linf" or self.perturbation == "constant"  # the derivative of sign is 0
        return found.detach() if constant else found

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _norms(gradient, least=torch.finfo(gradient.dtype).tiny)

    def _project(self, delta: Tensor, radius: float | Tensor) -> Tensor:
        if self.norm == "linf":
            limit = torch.as_tensor(radius, dtype=delta.dtype, device=delta.device)
            return torch.minimum(torch.maximum(delta, -limit), limit)
        norms = _norms(delta, least=torch.finfo(delta.dtype).tiny)
        return delta * torch.where(norms > radius, radius / norms, torch.ones_like(norms))

    def _start(self, inputs: Tensor, radius: float | Tensor) -> Tensor:
        if self.norm == "linf":
            return radius * (2 * torch.rand_like(inputs) - 1)
        drawn, size = torch.randn_like(inputs), inputs[0].numel()
        share = torch.rand_like(inputs.flatten(1)[:, :1]) ** (1 / size)
        return radius * share.view(-1, *[1] * (inputs.dim() - 1)) * drawn / _norms(drawn)

    def _closed_form(self, model: nn.Module, batch: Any, inputs: Tensor, radius: float | Tensor) -> Tensor:
        task = self._split("outputs")
        for module in model.modules():
            if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _LINEAR):
                raise InputError(
                    "steps=0 is the closed form of models that are linear in their inputs, and this one has a "
                    f"{type(module).__name__}. Give steps=5, for projected gradient ascent."
                )
        outputs = task.outputs(model, batch)
        if outputs.flatten(1).shape[1] > 2:
            raise InputError(
                "steps=0 is the closed form of one output or two classes, got outputs of shape "
                f"{tuple(outputs.shape)}. Give steps=5, for projected gradient ascent."
            )
        # The direction of r is a constant: ±1, or ±(1, −1). Its length may be anything, down to underflow.
        gradient = self._gradient_of_losses(task, outputs.detach(), batch)
        scores = lambda point: (task.outputs(model, self._with(batch, point)) * gradient).flatten(1).sum(1)  # noqa: E731
        return radius * self._direction(self._gradient(scores, inputs))

    def _gradient_of_losses(self, task: SplitTask, outputs: Tensor, batch: Any) -> Tensor:
        with _own_kernels():
            found = torch.func.grad(lambda outputs: task.losses_of(outputs, batch).sum())(outputs).detach()
        return found / _norms(found, least=torch.finfo(found.dtype).tiny)


def radius_for(steps: int, margin: float = 1.0) -> float:
    """Return γ(1 − T^{−½}), the radius at which a run of T steps turns to the maximum-margin direction at Õ(1/√T).

    Args:
        steps: T, the length of the run; the radius is the same in all of its steps.
        margin: γ, the l2 margin of the data: how far every input is on its side of the best separating plane through 0.

    >>> radius_for(100)
    0.9
    """
    if steps < 1 or not margin > 0:
        raise InputError(f"radius_for needs at least one step and a margin above 0, got {steps} and {margin}.")
    return margin * (1 - steps**-0.5)


def _norms(vectors: Tensor, least: float = 0.0) -> Tensor:
    """Norms over all axes but the first, which stay as axes of length 1; at 0 ``least``, with derivative 0."""
    axes = list(range(1, vectors.dim()))
    # Scaled by the largest component: squares of gradients underflow long before these do.
    largest = vectors.detach().abs().amax(axes, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    squares = (vectors / largest).square().sum(axes, keepdim=True)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt() * largest, least)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, with copies of their buffers, which the step is going to overwrite."""
    modes = [(module, module.training) for module in model.modules()]
    owned = [(module, name, leaf) for module, _ in modes for name, leaf in module._buffers.items() if leaf is not None]
    model.eval()
    try:
        for module, name, leaf in owned:
            module._buffers[name] = leaf.clone()
        yield
    finally:
        for module, name, leaf in owned:
            module._buffers[name] = leaf
        for module, training in modes:
            module.training = training


class _Isolated(TorchFunctionMode):
    """Keeps what is called inside from the modes outside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


@contextmanager
def _own_kernels() -> Iterator[None]:
    """The same kernels in the plain step as in its derivatives, which `torch.func` knows and which have second derivatives.

    While a step is differentiated, others are in force (``twice_differentiable`` with its own functions): they have two
    derivatives, and here there are three.
    """
    with _Isolated(), twice_differentiable(own_functions=False):
        yield
