"""Kernels whose second derivative is missing or slow, replaced while a step is differentiated.

Inside `twice_differentiable` four functions of torch are computed another way, with the same value to rounding:

* **batch normalisation** with running statistics: the fused kernel updates them outside of autograd, so ∂(statistics')/∂θ
  would be lost. Here the update is plain arithmetic on the module's input.
* **scaled dot-product attention**: the fused kernels have no second derivative; the math form has.
* **convolution**: torch's own second derivative forms the weight part by a detour through grouped convolutions. Written
  out, all of it is three calls of the ordinary kernels. With y = x ⋆ W, the first derivative maps (ȳ, x, W) to
  x̄ = ȳ ⋆ᵀ W and W̄ = x ⊛ ȳ; pulling cotangents u of x̄ and V of W̄ back through that map gives

      ȳ ← u ⋆ W + x ⋆ V          x ← ȳ ⋆ᵀ V          W ← u ⊛ ȳ

  Measured on one core for a whole adjoint step: 1.4 instead of 2.2 plain training steps per query.
* **cross-entropy** of class labels: the second derivative of the fused kernel has no batched form and would be looped
  over the costates. Picking from the log-probabilities has one.

Training and replay use torch's own kernels; only derivatives come through here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


@contextmanager
def twice_differentiable(convolutions: bool = True) -> Iterator[None]:
    """Within this context, models built of torch's modules can be differentiated twice.

    Args:
        convolutions: replace convolutions, too; not under `torch.func`, whose transforms know torch's own only.
    """
    with sdpa_kernel(SDPBackend.MATH), _SecondDerivatives(convolutions):
        yield


class _SecondDerivatives(TorchFunctionMode):
    def __init__(self, convolutions: bool):
        super().__init__()
        self.convolutions = convolutions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if self.convolutions and func in _CONVOLUTIONS:
            return _convolution(func, _CONVOLUTIONS[func], *args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    running_mean.mul_(1 - momentum).add_(momentum * input.mean(axes))
    running_var.mul_(1 - momentum).add_(momentum * input.var(axes, unbiased=True))
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    plain = weight is None and label_smoothing == 0.0 and size_average is None and reduce is None
    if not plain or target.is_floating_point() or input.dim() != target.dim() + 1 or reduction not in ("none", "mean", "sum"):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    counted = target != ignore_index
    axis = 1 if target.dim() else 0
    picked = F.log_softmax(input, dim=axis).gather(axis, target.where(counted, 0).unsqueeze(axis)).squeeze(axis)
    losses = -picked * counted
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _convolution(
    func: Any,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != dimensions + 2:
        return func(input, weight, bias, stride, padding, dilation, groups)

    def sizes(value: int | tuple[int, ...]) -> list[int]:
        return [value] * dimensions if isinstance(value, int) else list(value) * (dimensions // len(value))

    options = (sizes(stride), sizes(padding), sizes(dilation), False, [0] * dimensions, groups)
    output = _Convolution.apply(input, weight, options)
    return output if bias is None else output + bias.view(-1, *[1] * dimensions)


class _Convolution(torch.autograd.Function):
    """y = x ⋆ W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, options: tuple) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options = options
        return torch.ops.aten.convolution(input, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, output_bar: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if torch.is_grad_enabled():
            return *_ConvolutionBackward.apply(output_bar, input, weight, ctx.options, needed), None
        return *_first_derivative(output_bar, input, weight, ctx.options, needed), None


class _ConvolutionBackward(torch.autograd.Function):
    """The map (ȳ, x, W) → (x̄, W̄), whose pullback is written in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, output_bar: Tensor, input: Tensor, weight: Tensor, options: tuple, needed: tuple) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output_bar, input, weight)
        ctx.options = options
        return _first_derivative(output_bar, input, weight, options, needed)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> Any:  # type: ignore[override]
        output_bar, input, weight = ctx.saved_tensors
        options = ctx.options
        for_output_bar = for_input = for_weight = None
        if u is not None:
            for_output_bar = torch.ops.aten.convolution(u, weight, None, *options)
            if ctx.needs_input_grad[2]:
                for_weight = _first_derivative(output_bar, u, weight, options, (False, True))[1]
        if v is not None:
            through_weight = torch.ops.aten.convolution(input, v, None, *options)
            for_output_bar = through_weight if for_output_bar is None else for_output_bar + through_weight
            if ctx.needs_input_grad[1]:
                for_input = _first_derivative(output_bar, input, v, options, (True, False))[0]
        return for_output_bar, for_input, for_weight, None, None


def _first_derivative(output_bar: Tensor, input: Tensor, weight: Tensor, options: tuple, needed: tuple) -> tuple:
    return torch.ops.aten.convolution_backward(output_bar, input, weight, None, *options, [*needed, False])[:2]
