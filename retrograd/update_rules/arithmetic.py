"""Elementwise arithmetic with the rounding of ``torch.optim`` on CPU and with derivatives that stay finite.

With numbers as scales these functions call the fused kernels that ``torch.optim`` calls in place (``add`` with ``alpha``,
``addcmul``, ``addcdiv``, ``lerp``), as ``a + s * b`` in two operations rounds differently. Those kernels take no tensor that
carries a derivative as a scale, so with tensors they fall back to two operations, equal up to rounding.
"""

import torch
from torch import Tensor

Number = float | Tensor


def is_zero(number: Number) -> bool:
    """Return whether a term with this factor is to be skipped, as ``torch.optim`` skips it.

    A tensor is never skipped: it is there to be differentiated by, and the derivative at 0 counts.
    """
    return not isinstance(number, Tensor) and number == 0


def add_scaled(base: Tensor, direction: Tensor, scale: Number) -> Tensor:
    """Return base + scale · direction."""
    if isinstance(scale, Tensor):
        return base + scale * direction
    return torch.add(base, direction, alpha=scale)


def add_product(base: Tensor, left: Tensor, right: Tensor, scale: Number) -> Tensor:
    """Return base + scale · left · right."""
    if isinstance(scale, Tensor):
        return base + scale * (left * right)
    return torch.addcmul(base, left, right, value=scale)


def add_quotient(base: Tensor, numerator: Tensor, denominator: Tensor, scale: Number) -> Tensor:
    """Return base + scale · numerator / denominator."""
    if isinstance(scale, Tensor):
        return base + scale * (numerator / denominator)
    return torch.addcdiv(base, numerator, denominator, value=scale)


def interpolate(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    """Return start + weight · (end − start)."""
    if isinstance(weight, Tensor):
        return start + weight * (end - start)
    return torch.lerp(start, end, weight)


def decay(gradient: Tensor, parameter: Tensor, weight_decay: Number) -> Tensor:
    """Return the gradient of the loss plus weight_decay/2 · ‖parameter‖²: decay that is coupled to the gradient."""
    return gradient if is_zero(weight_decay) else add_scaled(gradient, parameter, weight_decay)


def sqrt_flat_at_zero(square: Tensor) -> Tensor:
    """Return √square, unchanged in value, whose derivative at exactly 0 is taken as 0.

    A mean of squared gradients is 0 only where every gradient so far was 0 (a dead unit, an embedding row not used yet) or so
    small that its square underflows. There d√v/dv is infinite, dv/dg = 2(1 − β₂)g is 0, and autograd's product of the two,
    NaN, would spread from that coordinate to the whole pullback. Nothing is lost by taking 0: v enters the update as m/(√v + ε)
    or g/(√v + ε), and where v is 0 that numerator, a factor of the derivative by v, is 0 too.

    Masking only the result is not enough (0 · ∞ again): the argument has to be masked, too.

    >>> v = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> sqrt_flat_at_zero(v).sum().backward()
    >>> v.grad
    tensor([0.0000, 0.2500])
    """
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
