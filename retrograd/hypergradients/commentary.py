"""Commentaries: what is said about training data while a model is trained on it, learned so that the trained model is good.

    φ* = argmin_φ L_val(θ_N(φ)),       θ_{i+1} = θ_i − (step of the optimizer along) ∇_θ Σ_a ℓ(t_φ, a; θ_i, i) / B

| kind | ℓ of example a | learned |
|---|---|---|
| `Weighted` | w · ℓ(x_a, y_a), w = σ(φ_a) or σ(net_φ(x_a, y_a, i/N)) | `ExampleWeights`, `WeightNetwork` |
| `Blended` | λ ℓ(x̃, y_a) + (1−λ) ℓ(x̃, y_b), x̃ = λ x_a + (1−λ) x_b, λ = 1 − σ(M_{y_a y_b})/2 | `BlendingMatrix` |
| `Masked` | ℓ(m ⊙ x_a, y_a), m_p = exp(−‖p − c‖²/2s²), c = net_φ(x_a) | `MaskNetwork` |

φ   parameters of the commentary t_φ, a meta-module;   i   step of N;   a, b   an example and its partner in the batch, which is
drawn anew in each step from the step's own random numbers, so that a replay meets the same pairs;   M   −1 at first;
p, c, s   pixel, centre and width of the mask, in pixels.

Both algorithms of the paper are calls of `meta_train(run, validation_data, "meta", ...)`, with a run that was recorded with
such a task and ``meta=`` such a module:

1. *Backpropagation through training*: the default, exact unrolling from a cold start. ``vary`` gives each outer step another
   initial state; without it all begin at the same one. For models that train in some hundreds of steps.
2. *Implicit differentiation*: a run of one step, ``start="warm"`` and ``method=FixedPoint(solver="neumann", iterations=2)``;
   the commentary is then frozen and judged by models that are trained anew (`audit`). The step i
   counts on over outer steps. The paper's Σ_{j≤1} (I − ηH)^j η is the series for SGD, so train with SGD here: `FixedPoint`
   takes that of the optimizer which is used, and at single batches Adam's does not converge.

Masks are looked through after training, too. So the model carries its mask (`MaskedModel`), as buffers that each step sets
to φ. What the outcome owes to φ through them is part of the exact derivative; `FixedPoint` leaves it out. The other two kinds
leave no trace at test time.

Assumptions: validation data as the model will meet them; everything learned is from them, so give few examples a chance
to be merely passed on and look at the audit's controls (permuted, validation data alone). Cost: that of `meta_train`.

Source: Raghu, Raghu, Kornblith, Duvenaud, Hinton (2021), "Teaching with commentaries", ICLR, sections 2 to 5. There, weights
depend on the image and the iteration; the label as a further input, and a weight for each example by itself, are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from retrograd.errors import InputError
from retrograd.task import Meta, SplitTask, Task


class ExampleWeights(nn.Module):
    """A weight for each training example by itself, at first ½.

    The data are to have the row of each example as their last column: ``(inputs, labels, torch.arange(len(labels)))``.

    Args:
        count: number of training examples.

    >>> weights = ExampleWeights(3)
    >>> weights((torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([2, 0])), 0.0)
    tensor([0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
    """

    def __init__(self, count: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, batch: Any, progress: float) -> Float[Tensor, " batch"]:
        """Return the weights of a batch of ``(inputs, labels, rows)``."""
        rows = batch[-1]
        if len(batch) < 3 or rows.is_floating_point() or rows.dim() != 1:
            raise InputError("a weight for each example needs to know which it is: give data (inputs, labels, arange(N)).")
        return self.logits[rows].sigmoid()


class WeightNetwork(nn.Module):
    """Weights as a function of the example and of how far training has come.

    Args:
        network: maps rows ``[batch, inputs + classes + 1]`` (flattened inputs, label, share of the training that is done) to
            ``[batch, 1]``.
        classes: number of classes if the network sees the label, as a one-hot vector; 0 if it does not.
    """

    def __init__(self, network: nn.Module, classes: int = 0):
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, batch: Any, progress: float) -> Float[Tensor, " batch"]:
        """Return the weights of a batch of ``(inputs, labels, ...)``."""
        inputs = batch[0].flatten(1)
        label = [F.one_hot(batch[1], self.classes).to(inputs)] if self.classes else []
        return self.network(torch.cat([inputs, *label, inputs.new_full((len(inputs), 1), progress)], 1))[:, 0].sigmoid()


class BlendingMatrix(nn.Module):
    """The share λ ∈ (½, 1) of an example of class a that is blended with one of class b.

    Args:
        classes: number of classes C.

    >>> BlendingMatrix(2).shares().min().item() > 0.86            # 1 − σ(−1)/2
    True
    """

    def __init__(self, classes: int):
        super().__init__()
        self.matrix = nn.Parameter(-torch.ones(classes, classes))

    def shares(self) -> Float[Tensor, "class class"]:
        """Return λ for each pair of classes."""
        return 1 - self.matrix.sigmoid() / 2

    def forward(self, labels: Int[Tensor, " batch"], partners: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return λ for examples and partners with these labels."""
        return self.shares()[labels, partners]


class MaskNetwork(nn.Module):
    """A Gaussian blob around a point that a network chooses for each image.

    Args:
        network: maps images to two numbers ``[batch, 2]``; their sigmoids are the height and width of the centre, as shares.
        size: height and width of the images.
        width: standard deviation s of the blob, in pixels.
    """

    grid: Tensor
    width: Tensor

    def __init__(self, network: nn.Module, size: Sequence[int], width: float):
        super().__init__()
        self.network = network
        rows, columns = (torch.arange(length, dtype=torch.float32) for length in size)
        self.register_buffer("grid", torch.stack(torch.meshgrid(rows, columns, indexing="ij")))
        self.register_buffer("width", torch.tensor(float(width)))

    def centres(self, images: Tensor) -> Float[Tensor, "batch 2"]:
        """Return the centre of each image's mask, in pixels."""
        ends = self.grid.flatten(1).amax(1).to(images)
        return self.network(images).sigmoid() * ends

    def forward(self, images: Tensor) -> Tensor:
        """Return masks that multiply images ``[batch, ..., height, width]``; their axes between are 1."""
        away = self.grid.to(images) - self.centres(images)[:, :, None, None]
        masks = torch.exp(-away.square().sum(1) / (2 * self.width.to(images) ** 2))
        return masks.reshape(len(images), *[1] * (images.dim() - 3), *masks.shape[1:])


class MaskedModel(nn.Module):
    """A model that looks through a mask: that of the commentary it is trained with, which it carries from then on.

    Args:
        model: any model of images.
        mask: the meta-module, such as a `MaskNetwork`. Its parameters are never trained along with the model's.
    """

    def __init__(self, model: nn.Module, mask: nn.Module):
        super().__init__()
        self.model = model
        self._mask = (mask,)  # in a tuple, it is no part of the model
        for name, leaf in mask.named_parameters():
            # NaN, so that the first step moves it whatever φ is: only buffers that move have a derivative.
            self.register_buffer(_buffer(name), torch.full_like(leaf.detach(), torch.nan))

    def carry(self, mask: nn.Module) -> None:
        """Take over the mask's parameters, differentiably where they are those of a replay."""
        for name, leaf in mask.named_parameters():
            self._buffers[_buffer(name)] = (leaf.detach() if isinstance(leaf, nn.Parameter) else leaf).clone()

    def masks(self, images: Tensor) -> Tensor:
        """Return the masks that it puts on images."""
        mask = self._mask[0]
        own = {name: self.get_buffer(_buffer(name)) for name, _ in mask.named_parameters()}
        return torch.func.functional_call(mask, own, (images,))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's outputs for the masked images."""
        return self.model(images * self.masks(images))


@dataclass(frozen=True)
class Weighted:
    """A task whose losses are weighted by a commentary; what is asked of the model is as without.

    The meta-module is called with ``(batch, progress)``, progress the share of the training that is done, and returns a weight
    for each example, ``[batch]``.

    Args:
        task: what is trained.
        steps: N, length of the training; progress is that of the commentary's end where training is longer. Without it,
            progress stays 0.
    """

    task: Task
    steps: int | None = None

    def losses(self, model: nn.Module, batch: Any, meta: Meta) -> Float[Tensor, " batch"]:
        """Return the weighted losses."""
        progress = 0.0 if self.steps is None else min(meta.step / self.steps, 1.0)
        return meta(batch, progress) * self.task.losses(model, batch)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return what the task asks."""
        return self.task.measurements(model, batch)


@dataclass(frozen=True)
class Blended:
    """A task whose examples are blended with others of their batch, as a commentary says; what is asked is as without.

    The meta-module is called with the labels of examples and partners and returns the share λ of the example, ``[batch]``.

    Args:
        task: what is trained, on batches ``(inputs, labels, ...)``; a `SplitTask`.
    """

    task: Task

    def __post_init__(self):
        if not isinstance(self.task, SplitTask):
            raise InputError(f"{type(self.task).__name__} does not say what its outputs are (see `retrograd.task.SplitTask`).")

    def losses(self, model: nn.Module, batch: Any, meta: Meta) -> Float[Tensor, " batch"]:
        """Return the losses of blended examples, each counted with the weight of the first of its two."""
        assert isinstance(self.task, SplitTask)
        inputs, labels, *rest = batch
        partners = torch.randperm(len(labels)).to(labels.device)  # the step has seeded the generator
        share = meta(labels, labels[partners])
        wide = share.reshape(-1, *[1] * (inputs.dim() - 1))
        blended = wide * inputs + (1 - wide) * inputs[partners]
        outputs = self.task.outputs(model, (blended, labels, *rest))
        own, other = (self.task.losses_of(outputs, (blended, target, *rest)) for target in (labels, labels[partners]))
        return share * own + (1 - share) * other

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return what the task asks."""
        return self.task.measurements(model, batch)


@dataclass(frozen=True)
class Masked:
    """A task of a `MaskedModel`, in training and after it.

    The meta-module is called with images and returns masks that multiply them.

    Args:
        task: what is trained.
    """

    task: Task

    def losses(self, model: nn.Module, batch: Any, meta: Meta) -> Float[Tensor, " batch"]:
        """Give the model the commentary's mask, and return its losses."""
        if not isinstance(model, MaskedModel):
            raise InputError("a model that is trained with masks carries them: record(MaskedModel(model, mask), ...).")
        model.carry(meta.module)
        return self.task.losses(model, batch)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return what the task asks of the model, which looks through the mask that it carries."""
        return self.task.measurements(model, batch)


def _buffer(name: str) -> str:
    return "mask_" + name.replace(".", "_")
