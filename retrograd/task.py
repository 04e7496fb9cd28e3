"""What is trained and what is asked: the two functions that a user writes.

A task never sees parameters or optimizers. It gets ``model``, the user's own module *bound* to some parameters
(`torch.func.functional_call` underneath), and uses it as plain torch code::

    class Denoising:
        def losses(self, model, batch):             # one loss per example, not reduced
            noisy, clean = batch
            return (model(noisy) - clean).square().mean(dim=(1, 2, 3))

        def measurements(self, model, batch):       # one number per query: what is asked about the trained model
            return self.losses(model, batch)

Losses that couple the examples of a batch (contrastive, ranking, graph losses) give
``loss(model, batch, weights) -> scalar`` instead of ``losses``; the weights are then theirs to use. Whatever ``losses``
does per example, the loss of a step is ``Σ_i w_i ℓ_i / B`` with B the number of examples in the batch.

What else shapes training and may be learned (an augmenter, a commentary, task weights) is a *meta-module*. A run that is
recorded with one hands it to ``losses`` (or ``loss``) as one argument more, a `Meta`::

    class Weighted:
        def losses(self, model, batch, meta):       # meta(...) calls the user's module, meta.step is the step t
            inputs, labels = batch
            return meta(inputs) * F.cross_entropy(model(inputs), labels, reduction="none")

Its parameters stay as they are while the model trains; hypergradients say how to change them.

A task whose losses are functions of the model's outputs can say so by two methods more, ``outputs`` and ``losses_of``
(`SplitTask`); Gauss-Newton matrices ask for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.errors import InputError
from retrograd.noise import Noise


@runtime_checkable
class Task(Protocol):
    """What a user has to write: per-example losses to train on, and measurements to ask about.

    ``model`` runs in training mode inside ``losses`` and in evaluation mode inside ``measurements``.
    """

    def losses(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " batch"]:
        """Return one loss per example of ``batch``, not reduced."""
        ...

    def measurements(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " query"]:
        """Return one number per query of ``batch``."""
        ...


@dataclass(frozen=True)
class Meta:
    """The meta-module as a step of training sees it: called like the module itself.

    Attributes:
        module: the user's module, bound to the meta-parameters of the run.
        step: number t of the step, from 0.
    """

    module: nn.Module
    step: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


@runtime_checkable
class MetaTask(Protocol):
    """A task that is trained with a meta-module; what is asked of the model has no part in it.

    ``loss(model, batch, weights, meta)`` in the place of ``losses`` couples the examples, as in `CoupledTask`.
    """

    def losses(self, model: nn.Module, batch: Any, meta: Meta, /) -> Float[Tensor, " batch"]:
        """Return one loss per example of ``batch``, not reduced."""
        ...

    def measurements(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " query"]:
        """Return one number per query of ``batch``."""
        ...


@runtime_checkable
class CoupledTask(Protocol):
    """A task whose loss couples the examples of a batch; their weights are an input of the loss."""

    def loss(self, model: nn.Module, batch: Any, weights: Float[Tensor, " batch"], /) -> Float[Tensor, ""]:
        """Return the scalar loss of the step."""
        ...

    def measurements(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " query"]:
        """Return one number per query of ``batch``."""
        ...


@runtime_checkable
class Samples(Protocol):
    """A task whose losses are −log of the model's own distribution of targets, from which it can draw.

    Curvature (Fisher, K-FAC, EK-FAC) asks for it: with targets y drawn given the inputs, the second moment of ∇ℓ is the
    Gauss-Newton matrix. ``model`` runs in evaluation mode, without gradients.
    """

    def sampled(self, model: nn.Module, batch: Any, noise: Noise, /) -> Any:
        """Return a batch like ``batch`` with targets drawn with ``noise``: ``losses`` of it gives the pseudo-gradients."""
        ...


@runtime_checkable
class TokenTask(Protocol):
    """A task whose loss of an example is a sum over positions. Scores by token ask for it."""

    def token_losses(self, model: nn.Module, batch: Any, /) -> Float[Tensor, "batch position"]:
        """Return what each position adds to its example's loss: the sum over positions is ``losses``."""
        ...


@runtime_checkable
class SplitTask(Task, Protocol):
    """A task whose losses are functions of the model's outputs: ``losses`` is ``losses_of(outputs(model, batch), batch)``.

    Gauss-Newton matrices ask for it: they keep the curvature of the losses in the outputs, taken by autograd through
    ``losses_of``, and leave out that of the model. Outputs have the batch axis first and any axes after it::

        class NextToken:
            def outputs(self, model, batch):            # [batch, position, token]
                return model(batch[:, :-1])

            def losses_of(self, outputs, batch):
                return F.cross_entropy(outputs.mT, batch[:, 1:], reduction="none").mean(1)

            def losses(self, model, batch):
                return self.losses_of(self.outputs(model, batch), batch)

            measurements = losses

    Everything of the losses that depends on parameters has to pass through the outputs, and random numbers have to be drawn in
    the same order as in ``losses``. That both give the same losses is checked wherever the two are used.
    """

    def outputs(self, model: nn.Module, batch: Any, /) -> Float[Tensor, "batch *axes"]:
        """Return the model's outputs for the inputs of ``batch``."""
        ...

    def losses_of(self, outputs: Float[Tensor, "batch *axes"], batch: Any, /) -> Float[Tensor, " batch"]:
        """Return one loss per example, given the outputs; must be twice differentiable in them."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy on ``(inputs, labels)``; asks for the margin of the true label, its log-probability, or the loss.

    Args:
        measurement: ``"margin"`` is log p − log(1 − p) of the true label's probability p (in nats; positive where the
            model is right with p > ½), ``"log_probability"`` is log p, ``"loss"`` is −log p.
        label_smoothing: share of the target that is spread over all classes in the training loss.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> batch = (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    >>> Classification().measurements(model, batch).item()        # two classes: the margin is the logit difference
    2.0
    """

    measurement: Literal["margin", "log_probability", "loss"] = "margin"
    label_smoothing: float = 0.0

    def losses(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """Return the cross-entropy of each example, in nats."""
        return self.losses_of(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch *axes"]:
        """Return the logits."""
        return model(batch[0])

    def losses_of(self, outputs: Float[Tensor, "batch *axes"], batch: Any) -> Float[Tensor, " batch"]:
        """Return the cross-entropy of each example with these logits, in nats."""
        return F.cross_entropy(outputs, batch[1], reduction="none", label_smoothing=self.label_smoothing)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the chosen measurement of each query, in nats."""
        inputs, labels = batch
        log_probabilities = F.log_softmax(model(inputs), dim=-1)
        true = log_probabilities.gather(1, labels[:, None])[:, 0]
        if self.measurement == "margin":
            others = log_probabilities.scatter(1, labels[:, None], -torch.inf)
            return true - others.logsumexp(dim=1)
        return true if self.measurement == "log_probability" else -true

    def sampled(self, model: nn.Module, batch: Any, noise: Noise) -> Any:
        """Draw a class k for each example, and give it the weight that makes the second moment of ∇ℓ right.

        The Gauss-Newton matrix of the logits is Σ_k p_k (p − e_k)(p − e_k)ᵀ. Drawn from p itself, as is usual, k is nearly
        always the class that the model is sure of, and the few draws of another carry all of the curvature: of 1,200 digits
        that a network has learnt, three. Drawn from q_k ∝ p_k ‖p − e_k‖, with the target √(p_k/q_k) e_k, the expectation is
        the same and the weights are the most even: the sure class and any other come up about equally often.

        Smoothing by s makes (1 − s) t + s/K of given targets t; t = (target − s/K) / (1 − s) undoes it.
        """
        if self.label_smoothing >= 1:
            raise InputError("label_smoothing=1 leaves no label in the loss; curvature needs label_smoothing below 1.")
        inputs = batch[0]
        outputs = model(inputs).detach()
        probabilities = outputs.double().softmax(dim=-1)
        squares = probabilities.square()
        norms = (squares.sum(-1, keepdim=True) - squares + (1 - probabilities).square()).clamp(min=0).sqrt()
        chances = probabilities * norms
        sure = chances.sum(-1, keepdim=True) == 0  # to the last digit
        chances = torch.where(sure, probabilities, chances)
        sums = chances.cumsum(dim=-1)
        points = noise.uniform(1).to(sums.device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, points).clamp(max=sums.shape[1] - 1)
        weights = (probabilities.gather(1, drawn) / chances.gather(1, drawn) * sums[:, -1:]).sqrt()
        targets = torch.zeros_like(probabilities).scatter_(1, drawn, weights)
        smoothing = self.label_smoothing
        return inputs, ((targets - smoothing / sums.shape[1]) / (1 - smoothing)).to(outputs)


@dataclass(frozen=True)
class Regression:
    """Squared error on ``(inputs, targets)``; asks for the absolute error, the squared error, or the prediction.

    Args:
        measurement: ``"absolute_error"`` in units of the target, ``"loss"`` its square, ``"prediction"`` the output
            itself. Outputs with several components are averaged over them.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> Regression().measurements(model, (torch.tensor([[3.0]]), torch.tensor([[5.0]]))).item()
    1.0
    """

    measurement: Literal["absolute_error", "loss", "prediction"] = "absolute_error"

    def losses(self, model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        """Return the squared error of each example, averaged over output components."""
        return self.losses_of(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch *axes"]:
        """Return the predictions."""
        return model(batch[0])

    def losses_of(self, outputs: Float[Tensor, "batch *axes"], batch: Any) -> Float[Tensor, " batch"]:
        """Return the squared error of each of these predictions, averaged over its components."""
        return (_like_targets(outputs, batch[1]) - batch[1]).square().flatten(1).mean(dim=1)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the chosen measurement of each query."""
        inputs, targets = batch
        outputs = _like_targets(model(inputs), targets)
        if self.measurement == "prediction":
            return outputs.flatten(1).mean(dim=1)
        errors = (outputs - targets).abs() if self.measurement == "absolute_error" else (outputs - targets).square()
        return errors.flatten(1).mean(dim=1)

    def sampled(self, model: nn.Module, batch: Any, noise: Noise) -> Any:
        """Draw targets f + √(C/2) ε around the outputs f with their C components.

        ‖f − y‖²/C is −log of a normal density of variance C/2. The pseudo-gradient 2 (f − y)/C has the second moment
        4/C² · C/2 = 2/C, the curvature of the loss.
        """
        inputs, targets = batch
        outputs = _like_targets(model(inputs), targets).detach()
        spread = (outputs[0].numel() / 2) ** 0.5 if len(outputs) else 0.0
        return inputs, outputs + spread * noise.normal(*outputs.shape[1:]).to(outputs)


def _like_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    # [B, 1] against [B] would broadcast to [B, B] and train on nonsense without a word.
    if outputs.shape != targets.shape:
        raise InputError(
            f"Regression got outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}. "
            "They must be equal; reshape the targets, for example targets[:, None]."
        )
    if outputs.dim() < 2:
        raise InputError("Regression needs outputs of shape [batch, components]; end the model with a [batch, 1] layer.")
    return outputs


AnyTask = Task | CoupledTask | MetaTask
"""What can be trained."""


def weighted_loss(
    task: AnyTask, model: nn.Module, batch: Any, weights: Tensor | None, size: int, meta: Meta | None = None
) -> Tensor:
    """Return the loss of one step, ``Σ_i w_i ℓ_i / B``; ``weights=None`` means all ones."""
    more = () if meta is None else (meta,)
    if isinstance(task, CoupledTask):
        return task.loss(model, batch, torch.ones(size) if weights is None else weights, *more)
    return weighted_mean(task.losses(model, batch, *more), weights, size, f"{type(task).__name__}.losses")


def weighted_mean(losses: Tensor, weights: Tensor | None, size: int, source: str) -> Tensor:
    """Return ``Σ_i w_i ℓ_i / B``; ``source`` names what gave the losses, should there not be one for each example."""
    if losses.shape != (size,):
        raise InputError(
            f"{source} gave shape {tuple(losses.shape)} for a batch of {size} examples. It must give one "
            f"loss per example, shape ({size},): use reduction='none' and average over everything but the batch axis."
        )
    return losses.sum() / size if weights is None else (weights.to(losses) * losses).sum() / size


def split_task(task: Any) -> SplitTask:
    """Return the task as one that knows its outputs.

    Raises:
        InputError: it does not.
    """
    name = type(task).__name__
    if isinstance(task, CoupledTask):
        raise InputError(
            f"{name} couples the examples of a batch, so its loss is no mean of losses of each example's output, and has no "
            "Gauss-Newton matrix. If it can be such a mean, give the task `losses`, `outputs` and `losses_of` instead of "
            "`loss` (see retrograd.task.SplitTask)."
        )
    if not isinstance(task, SplitTask):
        raise InputError(
            f"a Gauss-Newton matrix needs the curvature of {name}'s losses in the model's outputs, and {name} does not say "
            "what these are. Implement `outputs(model, batch)`, of shape [batch, ...], and `losses_of(outputs, batch)`, one "
            "loss per example, with losses(model, batch) = losses_of(outputs(model, batch), batch): see "
            "retrograd.task.SplitTask."
        )
    return task


def check_split(task: SplitTask, losses: Tensor, split: Tensor) -> None:
    """Compare the two ways to the losses of a `SplitTask`: a subclass may have overridden one and not the other.

    Args:
        task: names the culprit.
        losses: what ``losses`` gave.
        split: what ``losses_of`` gave of ``outputs``, for the same model, batch and random numbers.

    Raises:
        InputError: they differ by more than half of the digits, which rounding does not explain.
    """
    losses, split = losses.detach(), split.detach().to(losses)
    agree = losses.shape == split.shape
    if agree and len(losses):
        scale = losses.abs().max()
        agree = bool((losses - split).abs().max() <= torch.finfo(losses.dtype).eps ** 0.5 * scale)
    if not agree:
        name = type(task).__name__
        raise InputError(
            f"{name}.losses and {name}.losses_of(outputs) do not give the same losses, so the curvature of one is not that of "
            "the other. Override `losses_of` instead of `losses` (and `outputs`, where the inputs go another way), and let "
            "losses(model, batch) be losses_of(outputs(model, batch), batch), drawing random numbers in the same order."
        )


class _Caller(nn.Module):
    """A module whose forward calls ``function(model, …)``, so that functional_call can bind any use of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class BoundModel:
    """A user's module whose parameters and buffers can be given at each call.

    Buffers that the call changes are left in ``tensors`` (they are replaced or written in place there, and the module's
    own are not touched).
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._caller = _Caller(model)

    def __call__(self, function: Callable[..., Any], tensors: Mapping[str, Tensor], *args: Any) -> Any:
        """Return ``function(model, *args)`` with ``tensors`` in place of the module's own, tied weights staying tied."""
        # Parameters that are not given are constants, whether or not somebody trains them elsewhere.
        rest = [(name, leaf) for name, leaf in self.model.named_parameters() if leaf.requires_grad and name not in tensors]
        prefixed = {"model." + name: tensor for name, tensor in tensors.items()}
        prefixed |= {"model." + name: leaf.detach() for name, leaf in rest}
        result = torch.func.functional_call(self._caller, prefixed, (function, *args))
        for name in tensors:
            if prefixed["model." + name] is not tensors[name]:
                tensors[name] = prefixed["model." + name]  # type: ignore[index]
        return result
