"""The Jacobian of an elementwise update rule: a few numbers a coordinate, shared by all tangents and costates of a step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from retrograd.params import Params
from retrograd.update_rules import Hyper, UpdateRule

Coefficient = Tensor | float
Jacobian = dict[str, dict[str, Coefficient]]


def elementwise_jacobian(
    rule: UpdateRule, parameter: Tensor, slots: Params, gradient: Tensor, hyper: Hyper, numbers: Iterable[str] = ()
) -> Jacobian:
    """Jacobian of an elementwise rule: for each output and input one coefficient a coordinate.

    Because U acts on each coordinate alone, reversing it with ones gives ∂out/∂in of every coordinate at once. These few
    numbers are computed once a step and shared by all queries. A coefficient that is the same everywhere becomes a
    number, so that a multiplication by 1 or 0 is never carried out on ``[query, P]``; those of a linear rule (`SGD`) are, and
    one coordinate tells them.

    The hyperparameters that ``numbers`` names are taken as one more input each, with a value of its own in every coordinate.
    """
    inputs = {"parameter": parameter, **slots, "gradient": gradient}
    moved = {number: torch.full_like(parameter, float(hyper[number])) for number in sorted(numbers)}
    if getattr(rule, "linear", False) and parameter.numel():
        one = {name: leaf.flatten()[:1] for name, leaf in inputs.items()}
        jacobian = _reversed(rule, one, {}, slots, hyper, [*inputs])
        if moved:
            for target, row in _reversed(rule, inputs, moved, slots, hyper, [*moved]).items():
                jacobian[target] |= row
        return jacobian
    return _reversed(rule, inputs, moved, slots, hyper, [*inputs, *moved])


def _reversed(rule: UpdateRule, inputs: Params, moved: Params, slots: Params, hyper: Hyper, sources: list[str]) -> Jacobian:
    """Reverse U with ones, for the derivatives by ``sources``."""
    leaves = {name: leaf.detach().requires_grad_(name in sources) for name, leaf in {**inputs, **moved}.items()}
    with torch.enable_grad():
        own = {slot: leaves[slot] for slot in slots}
        at = {**hyper, **{number: leaves[number] for number in moved}}
        new_parameter, new_slots = rule.apply(leaves["parameter"], own, leaves["gradient"], at)
    wanted = [leaves[name] for name in sources]
    jacobian: Jacobian = {}
    for target, output in {"parameter": new_parameter, **new_slots}.items():
        if not output.requires_grad:
            jacobian[target] = dict.fromkeys(sources, 0.0)
            continue
        found = torch.autograd.grad(output, wanted, torch.ones_like(output), True, allow_unused=True)
        jacobian[target] = {source: _simplest(row) for source, row in zip(sources, found, strict=True)}
    return jacobian


def _simplest(coefficients: Tensor | None) -> Coefficient:
    if coefficients is None:
        return 0.0
    first = coefficients.flatten()[0]
    return first.item() if bool((coefficients == first).all()) else coefficients.detach()


def combine(terms: list[tuple[Coefficient, Tensor]], like: Tensor) -> Tensor:
    """Σ coefficient · vector with as few passes over ``[query, P]`` as the coefficients allow.

    The result is not to be written to: where there is nothing to do it is the vector itself.
    """
    terms = [term for term in terms if not _is(term[0], 0.0)]
    terms.sort(key=lambda term: not _is(term[0], 1.0))
    if not terms:
        return torch.zeros_like(like)
    (coefficient, vector), *rest = terms
    if not _is(coefficient, 1.0):
        total = vector * coefficient
    elif rest:
        total = _plus(vector, *rest.pop(0))
    else:
        return vector
    for coefficient, other in rest:
        _plus(total, coefficient, other, out=total)
    return total


def share(terms: list[tuple[Coefficient, Tensor]], whole: list[tuple[Coefficient, Tensor]]) -> float | None:
    """Return r with Σ terms = r Σ whole (to rounding) for combinations of the same vectors, or None if there is no such number.

    With momentum, what a slot's costate becomes is such a share of γ: one pass over ``[query, P]`` instead of three.
    """
    ratio = None
    for (part, vector), (all_of_it, _) in zip(terms, whole, strict=True):
        if isinstance(part, Tensor) or isinstance(all_of_it, Tensor) or (all_of_it == 0.0) != (part == 0.0):
            return None
        if all_of_it != 0.0:
            own = part / all_of_it
            if ratio is not None and abs(own - ratio) > 4 * torch.finfo(vector.dtype).eps * abs(ratio):
                return None
            ratio = own
    return ratio


def _plus(total: Tensor, coefficient: Coefficient, vector: Tensor, out: Tensor | None = None) -> Tensor:
    if isinstance(coefficient, Tensor):
        return torch.addcmul(total, coefficient, vector, out=out)
    return torch.add(total, vector, alpha=coefficient, out=out)


def _is(coefficient: Coefficient, number: float) -> bool:
    return isinstance(coefficient, float) and coefficient == number
