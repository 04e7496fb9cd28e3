"""Kernels whose second derivative is missing or slow, replaced while a step is differentiated.

Inside `twice_differentiable` some functions of torch are computed another way, with the same value to rounding:

* **batch normalisation** with running statistics: the fused kernel updates and reads them outside of autograd, so all
  derivatives through them would be lost. Here both are plain arithmetic.
* **scaled dot-product attention**: the fused kernels have no second derivative; the plain form has.
* **instance, group and weight normalisation**: fused kernels whose second derivative is missing, fails in batches, or (weight
  normalisation in torch 2.13) is wrong. Plain arithmetic here.
* **softmax** p = σ(x): x̄ = p ∘ (p̄ − ⟨p, p̄⟩). Pulled back through that map, a cotangent u gives, with c = ⟨p, u⟩,
  d = ⟨p, p̄⟩ and v = p ∘ u ∘ (p̄ − d) − c p ∘ p̄,

      p̄ ← p ∘ (u − c)          x ← v − p Σv

  in seven passes over the probabilities, where torch makes over twenty.
* **convolution**: torch's own second derivative forms the weight part by a detour through grouped convolutions. Written
  out, all of it is three calls of the ordinary kernels. With y = x ⋆ W, the first derivative maps (ȳ, x, W) to
  x̄ = ȳ ⋆ᵀ W and W̄ = x ⊛ ȳ; pulling cotangents u of x̄ and V of W̄ back through that map gives

      ȳ ← u ⋆ W + x ⋆ V          x ← ȳ ⋆ᵀ V          W ← u ⊛ ȳ

  Measured on one core for a whole adjoint step: 1.4 instead of 2.2 plain training steps per query.
* **layer normalisation** x̂ = (x − mean) r with r = (var + ε)^(−½) over n numbers: x̄ = r P h for a cotangent h of x̂, with the
  symmetric P = I − (1 1ᵀ + x̂ x̂ᵀ)/n. Pulled back through that map, u gives

      h ← r P u          x ← −r (⟨u, x̄⟩ x̂ + ⟨h, x̂⟩ r P u + ⟨u, x̂⟩ x̄) / n
* **cross-entropy** of class labels: the second derivative of the fused kernel has no batched form and would be looped
  over the costates. Picking from the log-probabilities has one.

* **activations** (ReLU, GELU, tanh, …) act on each number alone, y = f(x). Their first and second derivatives are computed
  once and shared by all costates, which then cost three products; torch would derive them anew for each.

Training and replay use torch's own kernels; only derivatives come through here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_transforms: Any = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]  # those going on, or None
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


_SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax}
_ACTIVATIONS = {
    *(F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.gelu, F.silu, F.elu, F.softplus, F.mish),
    *(torch.tanh, Tensor.tanh, F.tanh, torch.sigmoid, Tensor.sigmoid, F.sigmoid),
}


@contextmanager
def twice_differentiable(own_functions: bool = True, shared: bool = True) -> Iterator[None]:
    """Within this context, models built of torch's modules can be differentiated twice.

    Args:
        own_functions: replace convolutions and activations, too; not under `torch.func`, whose transforms know only torch's.
        shared: whether several costates will share the derivatives of activations; for a single one torch's own way is as good.
    """
    with sdpa_kernel(SDPBackend.MATH), _SecondDerivatives(own_functions, shared):
        yield


class _SecondDerivatives(TorchFunctionMode):
    def __init__(self, own_functions: bool, shared: bool):
        super().__init__()
        self.own_functions, self.shared = own_functions, shared

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A loss may use torch.func itself, for a gradient penalty say: it can differentiate torch's own functions only.
        own_functions = self.own_functions and _transforms() is None
        if func is getattr(torch, "_weight_norm", None):
            return _weight_norm(*args, **kwargs)
        if func is F.instance_norm:
            return _instance_norm(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if own_functions and self.shared and func in _ACTIVATIONS and not kwargs.get("inplace", False) and len(args) == 1:
            return _activation(func, args[0], kwargs)
        if own_functions and func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if own_functions and func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if own_functions and func is F.group_norm:
            return _group_norm(*args, **kwargs)
        if own_functions and func in _SOFTMAXES:
            return _softmax(*args, **kwargs)
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if own_functions and func in _CONVOLUTIONS:
            return _convolution(func, _CONVOLUTIONS[func], *args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The second derivative of the fused kernel is wrong in torch 2.13 (its gradgradcheck fails).
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is None or running_var is None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = list(range(2, input.dim()))
    running_mean.mul_(1 - momentum).add_(momentum * input.mean(axes).mean(0))
    running_var.mul_(1 - momentum).add_(momentum * input.var(axes, unbiased=True).mean(0))
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)


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
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)
    if not training:
        shape = (-1, *[1] * (input.dim() - 2))
        scale = (running_var + eps).rsqrt() if weight is None else (running_var + eps).rsqrt() * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        return input * scale.view(shape) + shift.view(shape)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    running_mean.mul_(1 - momentum).add_(momentum * input.mean(axes))
    running_var.mul_(1 - momentum).add_(momentum * input.var(axes, unbiased=True))
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


def _activation(func: Any, input: Tensor, options: dict[str, Any]) -> Tensor:
    if not input.requires_grad or not torch.is_grad_enabled():
        return func(input, **options)
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        y = func(x, **options)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else None
    # ReLU and its like: nothing flows back through the slope, so nothing is computed there.
    curved = second is not None and bool(second.any())
    return _Activation.apply(input, y.detach(), first.detach(), second if curved else None)


class _Activation(torch.autograd.Function):
    """y = f(x), with f'(x) and f''(x) given."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, first, second)
        return output

    @staticmethod
    def backward(ctx: Any, output_bar: Tensor) -> Any:  # type: ignore[override]
        input, first, second = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _ActivationBackward.apply(output_bar, input, first, second), None, None, None
        return output_bar * first, None, None, None


class _ActivationBackward(torch.autograd.Function):
    """(ȳ, x) → x̄ = f'(x) ȳ, whose pullback of u is (f'(x) u, f''(x) ȳ u)."""

    @staticmethod
    def forward(ctx: Any, output_bar: Tensor, input: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
        ctx.save_for_backward(first, None if second is None else second * output_bar)
        return output_bar * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        first, curvature = ctx.saved_tensors
        return u * first, None if curvature is None else u * curvature, None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = _Softmax.apply(scores)
    return (F.dropout(probabilities, dropout_p) if dropout_p else probabilities) @ value


def _softmax(input: Tensor, dim: int, *options: Any, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Tensor:
    # torch.softmax takes the dtype third, functional.softmax after a stack level.
    dtype = next((option for option in options if isinstance(option, torch.dtype)), dtype)
    input = input if dtype is None else input.to(dtype)
    return _Softmax.apply(input.movedim(dim, -1)).movedim(-1, dim)


class _Softmax(torch.autograd.Function):
    """p = σ(x) along the last axis; rows of −∞ alone give zeros, as they do in attention."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        probabilities = torch.softmax(input, -1)
        if not torch.isfinite(probabilities.sum()):
            probabilities = probabilities.masked_fill(input.isneginf().all(-1, keepdim=True), 0.0)
        ctx.save_for_backward(input, probabilities)
        return probabilities

    @staticmethod
    def backward(ctx: Any, output_bar: Tensor) -> Any:  # type: ignore[override]
        input, probabilities = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _SoftmaxBackward.apply(output_bar, input, probabilities.detach())
        return torch.ops.aten._softmax_backward_data(output_bar, probabilities, -1, probabilities.dtype)


class _SoftmaxBackward(torch.autograd.Function):
    """(p̄, x) → x̄, whose pullback is written in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, output_bar: Tensor, input: Tensor, probabilities: Tensor) -> Tensor:
        weighted = probabilities * output_bar
        mean = weighted.sum(-1, keepdim=True)
        ctx.save_for_backward(probabilities, output_bar - mean, weighted)
        return torch.addcmul(weighted, probabilities, -mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        probabilities, centred, weighted = ctx.saved_tensors
        product = probabilities * u
        c = product.sum(-1, keepdim=True)
        v = torch.addcmul(product * centred, weighted, -c)
        for_output_bar = torch.addcmul(product, probabilities, -c)
        return for_output_bar, torch.addcmul(v, probabilities, -v.sum(-1, keepdim=True)), None


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    count = len(normalized_shape)
    flat = input.flatten(-count)
    output = _Normalise.apply(flat, eps).view_as(input)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    # The second derivative of the fused kernel fails in batches of cotangents.
    shape = [1, -1] + [1] * (input.dim() - 2)
    output = _Normalise.apply(input.reshape(len(input), num_groups, -1), eps).view_as(input)
    output = output if weight is None else output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


class _Normalise(torch.autograd.Function):
    """x̂ along the last axis."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, eps: float) -> Tensor:
        variance, mean = torch.var_mean(input, -1, correction=0, keepdim=True)
        scale = (variance + eps).rsqrt()
        output = (input - mean) * scale
        ctx.save_for_backward(input, output, scale)
        return output

    @staticmethod
    def backward(ctx: Any, output_bar: Tensor) -> Any:  # type: ignore[override]
        input, output, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _NormaliseBackward.apply(output_bar, input, output.detach(), scale), None
        return _project(output_bar, output, scale)[0], None


class _NormaliseBackward(torch.autograd.Function):
    """(h, x) → x̄, whose pullback is written in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, output_bar: Tensor, input: Tensor, output: Tensor, scale: Tensor) -> Tensor:
        input_bar, along = _project(output_bar, output, scale)
        ctx.save_for_backward(output, scale, input_bar, along)
        return input_bar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        output, scale, input_bar, along = ctx.saved_tensors
        projected, u_along = _project(u, output, scale)
        products = torch.addcmul(along * projected, (u * input_bar).mean(-1, keepdim=True), output)
        return projected, -scale * torch.addcmul(products, u_along, input_bar), None, None


def _project(vector: Tensor, output: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """R P v, and ⟨v, x̂⟩ / n."""
    along = (vector * output).mean(-1, keepdim=True)
    return torch.addcmul(vector - vector.mean(-1, keepdim=True), output, -along) * scale, along


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
    @once_differentiable
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
